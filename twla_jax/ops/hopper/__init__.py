"""Holds what all kernels for Hopper GPUs share."""
