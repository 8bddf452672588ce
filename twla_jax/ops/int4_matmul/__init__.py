"""Four-bit weights times int8 codes or bf16 activations, for the embedding and the LM head."""

from twla_jax.ops.int4_matmul.api import int4_matmul
from twla_jax.ops.int4_matmul.weight import Int4Weight, int4_rows, int4_weight

__all__ = ["Int4Weight", "int4_matmul", "int4_rows", "int4_weight"]
