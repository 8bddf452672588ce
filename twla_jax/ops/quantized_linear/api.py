"""From the residual stream through a quantised linear, and back onto the residual stream."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from twla_jax.ops.decode_attention import AttentionParts
from twla_jax.ops.dispatch import Implementation, dispatch
from twla_jax.ops.quantized_linear import gpu, reference
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul.weight import KernelWeight


def quantized_linear(
    x: Float[Array, "*tokens m"] | AttentionParts,
    rotation: KernelRotation | None,
    settings: Float32[Array, " 3"] | None,
    weight: KernelWeight,
    *,
    norm_scale: Float[Array, " m"] | None = None,
    epsilon: float = 0.0,
    residual: Float[Array, "*tokens n"] | None = None,
    gated: bool = False,
    out_dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "*tokens n"]:
    """`ternary_matmul(rotate_quantize(x), weight)`, rounded, and the residual added to it.

    For one token, and mostly for up to `MOST_TOKENS`, a Hopper GPU does it all in one kernel; everywhere else, and for
    more tokens, it is those two ops.

    Args:
      x: of attention left in parts, the mix is merged first, and `*tokens` are its first axis.
      settings: from `quantizer_settings`; None for codes of 16 bits, `tokens.wide_tokens`.
      norm_scale: weights of an RMS norm before the rotation; None for no norm.
      epsilon: what the norm adds to the mean square.
      residual: in `out_dtype`.
      gated: the weight is two matrices of one size, and their outputs become `silu(first) · second`, half as many.
      implementation: as the two ops take it.
    Raises:
      TwlaError: the implementation asked for cannot be used.
    """
    tokens = x if isinstance(x, AttentionParts) else x.reshape(-1, x.shape[-1])
    n = weight.out_features // (2 if gated else 1)
    added = None if residual is None else residual.reshape(-1, n)
    options = {"epsilon": epsilon, "gated": gated, "out_dtype": out_dtype}
    two_ops = functools.partial(reference.quantized_linear, implementation=implementation, **options)
    operands = (tokens, rotation, settings, weight, norm_scale, added)
    reason = gpu.obstacle(tokens, rotation, weight, gated=gated, wide=settings is None)
    if implementation in ("xla", "tpu") or reason:
        y = two_ops(*operands)
    else:
        fused = functools.partial(gpu.quantized_linear, **options)
        y = dispatch("quantized_linear", implementation, two_ops, {"gpu": fused}, {}, *operands)
    return y if isinstance(x, AttentionParts) else y.reshape(*x.shape[:-1], n)
