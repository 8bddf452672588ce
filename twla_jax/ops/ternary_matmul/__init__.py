"""Multiplies int8 codes or bf16 activations by ternary weights."""

from twla_jax.ops.ternary_matmul.api import ternary_matmul
from twla_jax.ops.ternary_matmul.weight import KernelWeight, kernel_weight

__all__ = ["KernelWeight", "kernel_weight", "ternary_matmul"]
