"""From the queries, keys and values of one new token a sequence to its mix of the values so far."""

import functools

from jaxtyping import Array, Float, Int32

from twla_jax.devices import gpu_obstacle
from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.parts import AttentionParts
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import gpu, reference
from twla_jax.ops.dispatch import Implementation, dispatch


def decode_attention(
    qkv: Float[Array, "b all_heads d"],
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    *,
    norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    epsilon: float = 0.0,
    apart: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "b heads_d"] | AttentionParts, LayerKV]:
    """Norms queries and keys, turns them to their position, adds keys and values to the cache, and attends to it.

    A Hopper GPU does it all in one kernel, for bf16 queries and a cache of bf16 or int8, which if donated is written in
    place.

    Args:
      qkv: heads of queries, of keys and of values, neither normed nor turned.
      layer: a cache with room for another position.
      positions: that of the token, those of the cache's entries, and the token's angles.
      window: how many positions attention reaches back, the token's own included.
      norm_scales: weights of an RMS norm of every query and of every key; None for no norm.
      epsilon: what the norm adds to the mean square.
      apart: for programs that run on a GPU: where the kernel is faster so, it leaves the mix in parts, as
        `quantized_linear` takes it.
      implementation: None lets the platform decide; `gpu` means the kernel where it can take these operands.
    Returns:
      The mix of the values, in `qkv.dtype`, and the cache with the token.
    Raises:
      TwlaError: there is no implementation of this name.
    """
    reason = gpu.obstacle(qkv, layer)
    xla, kernel = (
        functools.partial(op, epsilon=epsilon) for op in (reference.decode_attention, gpu.decode_attention)
    )
    operands = (qkv, layer, positions, window, norm_scales)
    if apart and implementation in (None, "gpu") and not (reason or gpu_obstacle()):
        return kernel(*operands, apart=True)
    if implementation in ("xla", "tpu") or (implementation == "gpu" and reason):
        return xla(*operands)
    return dispatch("decode_attention", implementation, xla, {"gpu": kernel}, {"gpu": reason}, *operands)
