"""Kernels of the inference path: one folder an op, each with an XLA reference beside its GPU and TPU kernels."""
