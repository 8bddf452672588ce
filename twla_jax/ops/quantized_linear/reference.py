"""Computes a quantised linear as two ops, one after the other."""

from jaxtyping import Array, Float, Float32

from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.rotate_quantize import KernelRotation, gate, rotate_quantize
from twla_jax.ops.ternary_matmul import KernelWeight, ternary_matmul


def quantized_linear(
    x: Float[Array, "t m"] | AttentionSplits,
    rotation: KernelRotation | None,
    settings: Float32[Array, " 3"] | None,
    weight: KernelWeight,
    norm_scale: Float[Array, " m"] | None,
    residual: Float[Array, "t n"] | None,
    *,
    epsilon: float,
    gated: bool,
    out_dtype,
    implementation: Implementation | None,
) -> Float[Array, "t n"]:
    """Return the product of the rotated codes, through its gate if any, plus the residual in the product's dtype."""
    if isinstance(x, AttentionSplits):
        x = x.merged()
    tokens = rotate_quantize(
        x, rotation, settings, norm_scale=norm_scale, epsilon=epsilon, implementation=implementation
    )
    options = {"out_dtype": out_dtype, "implementation": implementation}
    if not gated:
        return ternary_matmul(tokens, weight, residual, **options)
    y = gate(ternary_matmul(tokens, weight, **options))
    return y if residual is None else residual + y
