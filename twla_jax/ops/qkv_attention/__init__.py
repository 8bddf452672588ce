"""One new token's queries, keys and values, and its attention: the XLA reference and a kernel for Hopper GPUs."""

from twla_jax.ops.qkv_attention.api import new_exchange, qkv_attention

__all__ = ["new_exchange", "qkv_attention"]
