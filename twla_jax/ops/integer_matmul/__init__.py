"""Multiplies bf16 activations by weights of four or eight bits, for the embedding and the LM head."""

from twla_jax.ops.integer_matmul.api import integer_matmul
from twla_jax.ops.integer_matmul.weight import IntegerWeight, integer_rows, integer_weight, obstacle

__all__ = ["IntegerWeight", "integer_matmul", "integer_rows", "integer_weight", "obstacle"]
