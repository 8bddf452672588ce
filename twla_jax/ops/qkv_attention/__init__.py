"""Computes the queries, keys and values of one new token, and its attention."""

from twla_jax.ops.qkv_attention.api import new_qkv_exchange, qkv_attention

__all__ = ["new_qkv_exchange", "qkv_attention"]
