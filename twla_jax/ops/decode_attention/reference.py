"""Computes one new token's attention in plain XLA: it runs everywhere, and is what the kernel is tested against."""

from jaxtyping import Array, Float, Int32

from twla_jax.ops.attention import rope
from twla_jax.ops.attention.kv_cache import LayerKV, write
from twla_jax.ops.attention.reference import Positions, attention
from twla_jax.ops.rotate_quantize.reference import rms_norm


def decode_attention(
    qkv: Float[Array, "b all_heads d"],
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    *,
    epsilon: float = 0.0,
) -> tuple[Float[Array, "b heads_d"], LayerKV]:
    """Return what `rms_norm` (if there are scales), `rope.rotate`, `kv_cache.write` and `attention` compute in turn."""
    q, layer = rotated_and_written(qkv, layer, positions, norm_scales, epsilon=epsilon)
    return attention(q, layer, positions, window)[:, 0], layer


def rotated_and_written(
    qkv: Float[Array, "b all_heads d"],
    layer: LayerKV,
    positions: Positions,
    norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    *,
    epsilon: float = 0.0,
) -> tuple[Float[Array, "b 1 heads d"], LayerKV]:
    """Return the queries, normalised and rotated, and the cache with the keys and values."""
    kv_heads = layer.entries.shape[2]
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv[:, None, :heads], qkv[:, None, heads:-kv_heads], qkv[:, None, -kv_heads:]
    if norm_scales is not None:
        q, k = (rms_norm(x, scale, epsilon) for x, scale in zip((q, k), norm_scales, strict=True))
    q, k = (rope.rotate(x, positions.cos, positions.sin) for x in (q, k))
    return q, write(layer, k, v, positions.start)
