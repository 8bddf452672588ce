"""Computes the attention of one new token a sequence: the public entry of this op."""

import functools

from jaxtyping import Array, Float, Int32

from twla_jax.devices import gpu_obstacle
from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.attention.splits import AttentionSplits
from twla_jax.ops.decode_attention import gpu, gpu_attend, reference, tpu
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
) -> tuple[Float[Array, "b heads_d"] | AttentionSplits, LayerKV]:
    """Return the mix of the values for one new token a sequence, `[b, heads·d]`, and the cache with the token.

    Queries and keys are normalised if there are `norm_scales`, and rotated to their position; the key and the value are
    written into the cache; then the query attends to it. A Hopper GPU does it all in one kernel, for bf16 queries and a
    cache of bf16 or int8, which is updated in place if it is donated. On a TPU a kernel attends, once XLA has written.

    Args:
      qkv: heads of queries, of keys and of values, neither normalised nor rotated.
      layer: a cache with room for another position.
      positions: that of the token, those of the cache's entries, and the token's angles.
      window: how many positions attention reaches back, the token's own included.
      norm_scales: weights of an RMS norm of every query and of every key; None for no norm.
      epsilon: added to the mean square in the norm.
      apart: for programs that run on a GPU: where the kernel is faster so, it leaves the mix in splits of the
        positions, which `quantized_linear` merges.
      implementation: None lets the platform decide; `gpu` and `tpu` mean the kernel where it can take these operands.

    Returns:
      The mix of the values, in `qkv.dtype`, and the cache with the token.

    Raises:
      TwlaError: there is no implementation of this name.
    """
    obstacles = {"gpu": gpu_attend.obstacle(qkv, layer), "tpu": tpu.obstacle(qkv, layer)}
    xla, *kernels = (functools.partial(op.decode_attention, epsilon=epsilon) for op in (reference, gpu, tpu))
    operands = (qkv, layer, positions, window, norm_scales)
    if apart and implementation in (None, "gpu") and not (obstacles["gpu"] or gpu_obstacle()):
        return kernels[0](*operands, apart=True)
    if implementation and obstacles.get(implementation):
        return xla(*operands)
    kernels = dict(zip(obstacles, kernels, strict=True))
    return dispatch("decode_attention", implementation, xla, kernels, obstacles, *operands)
