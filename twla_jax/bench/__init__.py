"""Measures speed on the device at hand: kernels, prefill and whole-model decode, beside XLA's own in the same run."""

from twla_jax.bench.run import PARTS, measure
from twla_jax.bench.shapes import SHAPES

__all__ = ["PARTS", "SHAPES", "measure"]
