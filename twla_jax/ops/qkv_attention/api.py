"""Computes attention from the residual stream on: the public entry of this op."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from twla_jax.devices import gpu_obstacle
from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.qkv_attention import gpu, reference
from twla_jax.ops.rotate_quantize import KernelRotation
from twla_jax.ops.ternary_matmul import KernelWeight


def qkv_attention(
    x: Float[Array, "b m"],
    rotation: KernelRotation | None,
    settings: Float32[Array, " 3"] | None,
    weight: KernelWeight,
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    exchange: Int32[Array, "1 all_heads_d"] | None = None,
    *,
    norm_scale: Float[Array, " m"] | None = None,
    epsilon: float = 0.0,
    head_norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    head_epsilon: float = 0.0,
    apart: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "b heads_d"] | AttentionSplits, LayerKV, Int32[Array, "1 all_heads_d"] | None]:
    """Return `decode_attention(quantized_linear(x))`: the mix `[b, heads·d]`, the cache, and the next exchange.

    For one sequence a Hopper GPU does both in one kernel, if the mix may be left in splits and there is an exchange;
    everywhere else it is those two ops.

    Args:
      x: one token of every sequence.
      rotation: of the input; None for none.
      settings: from `quantizer_settings`; None for codes of 16 bits, see `tokens.wide_tokens`.
      weight: rows of queries, of keys and of values, head by head.
      layer: a cache with room for another position.
      positions: that of the token, those of the cache's entries, and the token's angles.
      window: how many positions attention reaches back, the token's own included.
      exchange: from `new_qkv_exchange`, or as the last call returned it; None for two ops.
      norm_scale: weights of an RMS norm before the rotation; None for no norm.
      epsilon: added to the mean square in that norm.
      head_norm_scales: weights of an RMS norm of every query and of every key; None for no norm.
      head_epsilon: added to the mean square in those.
      apart: as `decode_attention` takes it.
      implementation: as the two ops take it.

    Returns:
      The mix of the values, in `x.dtype`, the cache with the token, and the exchange for the next call.

    Raises:
      TwlaError: the requested implementation cannot be used.
    """
    operands: Any = (x, rotation, settings, weight, norm_scale, layer, positions, window, head_norm_scales)
    options = {"epsilon": epsilon, "head_epsilon": head_epsilon}
    can = apart and implementation in (None, "gpu") and not gpu_obstacle()
    if (
        exchange is not None
        and can
        and gpu.obstacle(x, rotation, weight, layer, wide=settings is None) is None
    ):
        return gpu.qkv_attention(*operands, exchange=exchange, **options)
    options |= {"apart": apart, "implementation": implementation}
    return *reference.qkv_attention(*operands, **options), exchange


def new_qkv_exchange(
    layer: LayerKV, rotation: KernelRotation, weight: KernelWeight, *, wide: bool = False
) -> Int32[Array, "1 n"] | None:
    """Return the words `[1, n]` that `qkv_attention` needs to be one kernel; None where it cannot be one."""
    if gpu_obstacle():
        return None
    shape, dtype = (layer.entries.shape[1], weight.in_features), rotation.left.dtype
    x = jax.eval_shape(lambda: jnp.zeros(shape, dtype))
    if gpu.obstacle(x, rotation, weight, layer, wide=wide) is not None:
        return None
    return jnp.zeros((1, weight.out_features), jnp.int32)
