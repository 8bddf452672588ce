"""Norm, rotation and quantiser in plain XLA: runs everywhere, and what the kernels are held against."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from twla_jax.core import activation, kotms
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
    """`kotms.rotate` (unless None) and `activation.quantize_tokens`, after an RMS norm if `norm_scale` is given.

    Before all that stands `silu(gate) · x` if the tokens are `gated`.
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
    """Returns the tokens as the quantiser takes them: gated, normed and rotated, each where asked for."""
    if gated:
        x = gate(x)
    if norm_scale is not None:
        x = rms_norm(x, norm_scale, epsilon)
    return x if rotation is None else kotms.rotate(x, *rotation.factors)


def gate(x: Float[Array, "*tokens 2m"]) -> Float[Array, "*tokens m"]:
    """`silu` of the first half of each token, times the second."""
    first, second = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(first) * second


def rms_norm(
    x: Float[Array, "*shape d"], scale: Float[Array, " d"], epsilon: float
) -> Float[Array, "*shape d"]:
    """`x / sqrt(mean(x²) + ε) · scale` over the last axis, in float32 inside, `x.dtype` outside."""
    values = x.astype(jnp.float32)
    values = values * lax.rsqrt(jnp.square(values).mean(-1, keepdims=True) + epsilon)
    return (values * scale.astype(jnp.float32)).astype(x.dtype)
