"""Norms, rotates and quantises in plain XLA: it runs everywhere, and kernels are tested against it."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from twla_jax.core import activation, kotms
from twla_jax.core.arrays import AnyArray
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.tokens import QuantizedTokens, group_sums, wide_tokens


def rotate_quantize(
    x: Float[Array, "t width"],
    rotation: KernelRotation | None,
    settings: Float32[Array, " 3"] | None,
    norm_scale: Float[Array, " m"] | None,
    *,
    epsilon: float,
    gated: bool = False,
) -> QuantizedTokens:
    """Return the tokens' codes, by the gate, the RMS norm, `kotms.rotate` and `activation.quantize_tokens`.

    The first three run only where `gated`, `norm_scale` and `rotation` say so. Without settings, codes have 16 bits.
    """
    x = rotated(x, rotation, norm_scale, epsilon=epsilon, gated=gated)
    if settings is None:
        return wide_tokens(x)
    levels, clip, half = settings
    codes, scale, zero_point = activation.quantize_tokens(x, levels, clip)
    signed = (codes - half).astype(jnp.int8)
    return QuantizedTokens(
        codes=signed, scale=scale[:, 0], zero_point=zero_point[:, 0] - half, sums=group_sums(signed)
    )


def rotated(
    x: Float[Array, "t width"],
    rotation: KernelRotation | None,
    norm_scale: Float[Array, " m"] | None,
    *,
    epsilon: float,
    gated: bool,
) -> Float[Array, "t m"]:
    """Return the tokens `[t, m]` as the quantiser takes them: gated, normalised and rotated, each where requested."""
    if gated:
        x = gate(x)
    if norm_scale is not None:
        x = rms_norm(x, norm_scale, epsilon)
    return x if rotation is None else kotms.rotate(x, *rotation.factors)


def gate(x: Float[Array, "*tokens width"]) -> Float[Array, "*tokens m"]:
    """Return `silu` of the first half of each token, times the second."""
    first, second = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(first) * second


def rms_norm(
    x: Float[AnyArray, "*shape d"], scale: Float[AnyArray, " d"], epsilon: float
) -> Float[Array, "*shape d"]:
    """Return `x / sqrt(mean(x²) + ε) · scale` over the last axis, in float32 inside, `x.dtype` outside."""
    values = jnp.asarray(x, jnp.float32)
    values = values * lax.rsqrt(jnp.square(values).mean(-1, keepdims=True) + epsilon)
    return (values * jnp.asarray(scale, jnp.float32)).astype(x.dtype)
