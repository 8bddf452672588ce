"""A quantised linear whole: norm, rotation, codes, product and residual."""

from twla_jax.ops.quantized_linear.api import quantized_linear

__all__ = ["quantized_linear"]
