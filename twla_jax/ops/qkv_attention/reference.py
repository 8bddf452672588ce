"""Computes queries, keys, values and attention as two ops, one after the other."""

from jaxtyping import Array, Float, Float32, Int32

from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import AttentionSplits, decode_attention
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.quantized_linear import quantized_linear
from twla_jax.ops.rotate_quantize import KernelRotation
from twla_jax.ops.ternary_matmul import KernelWeight


def qkv_attention(
    x: Float[Array, "b m"],
    rotation: KernelRotation | None,
    settings: Float32[Array, " 3"] | None,
    weight: KernelWeight,
    norm_scale: Float[Array, " m"] | None,
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    head_norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None,
    *,
    epsilon: float,
    head_epsilon: float,
    apart: bool,
    implementation: Implementation | None,
) -> tuple[Float[Array, "b heads_d"] | AttentionSplits, LayerKV]:
    """Return `decode_attention` of `quantized_linear`'s outputs, head by head, and the cache."""
    y = quantized_linear(
        x,
        rotation,
        settings,
        weight,
        norm_scale=norm_scale,
        epsilon=epsilon,
        out_dtype=x.dtype,
        implementation=implementation,
    )
    return decode_attention(
        y.reshape(len(y), -1, layer.entries.shape[-1]),
        layer,
        positions,
        window,
        norm_scales=head_norm_scales,
        epsilon=head_epsilon,
        apart=apart,
        implementation=implementation,
    )
