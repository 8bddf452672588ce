"""Attention of one new token a sequence: rotary positions, the write into the cache, and the mix of the values."""

from twla_jax.ops.decode_attention.api import decode_attention
from twla_jax.ops.decode_attention.parts import AttentionParts

__all__ = ["AttentionParts", "decode_attention"]
