"""Attention of one new token a sequence: rotary positions, the write into the cache, and the mix of the values."""

from twla_jax.ops.attention.parts import AttentionParts
from twla_jax.ops.decode_attention.api import decode_attention

__all__ = ["AttentionParts", "decode_attention"]
