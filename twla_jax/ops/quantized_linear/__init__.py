"""Computes a quantised linear whole: norm, rotation, codes, product and residual."""

from twla_jax.ops.quantized_linear.api import quantized_linear
from twla_jax.ops.quantized_linear.gpu_linear import MOST_TOKENS

__all__ = ["MOST_TOKENS", "quantized_linear"]
