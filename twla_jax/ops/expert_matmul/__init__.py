"""Multiplies each token by the matrices of the experts that it goes to."""

from twla_jax.ops.expert_matmul.api import expert_matmul
from twla_jax.ops.expert_matmul.blocks import ExpertBlocks, block_size, expert_blocks
from twla_jax.ops.expert_matmul.dense import add_outer_products, block_products, expert_products

__all__ = [
    "ExpertBlocks",
    "add_outer_products",
    "block_products",
    "block_size",
    "expert_blocks",
    "expert_matmul",
    "expert_products",
]
