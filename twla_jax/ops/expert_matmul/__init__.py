"""Multiplies each token by the matrices of the experts that it goes to."""

from twla_jax.ops.expert_matmul.blocks import ExpertBlocks, block_size, expert_blocks
from twla_jax.ops.expert_matmul.dense import block_products

__all__ = ["ExpertBlocks", "block_products", "block_size", "expert_blocks"]
