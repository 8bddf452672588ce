"""Attends with one new token a sequence: rotary positions, the write into the cache, and the mix of the values."""

from twla_jax.ops.attention.splits import AttentionSplits
from twla_jax.ops.decode_attention.api import decode_attention

__all__ = ["AttentionSplits", "decode_attention"]
