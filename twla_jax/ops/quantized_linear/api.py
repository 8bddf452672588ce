"""Computes a quantised linear with its residual: the public entry of this op."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.dispatch import Implementation, dispatch
from twla_jax.ops.quantized_linear import gpu, gpu_linear, reference
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul.weight import KernelWeight


def quantized_linear(
    x: Float[Array, "*tokens m"] | AttentionSplits,
    rotation: KernelRotation | None,
    settings: Float32[Array, " 3"] | None,
    weight: KernelWeight,
    *,
    norm_scale: Float[Array, " m"] | None = None,
    epsilon: float = 0.0,
    residual: Float[Array, "*residuals n"] | None = None,
    gated: bool = False,
    out_dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "*tokens n"]:
    """Return `ternary_matmul(rotate_quantize(x), weight)` `[*tokens, n]`, rounded, plus the residual.

    For one token, and mostly for up to `MOST_TOKENS`, a Hopper GPU does it all in one kernel; everywhere else, and for
    more tokens, it is those two ops.

    Args:
      x: the input; attention left in splits is merged first, and `*tokens` are its first axis.
      rotation: of the input; None for none.
      settings: from `quantizer_settings`; None for codes of 16 bits, see `tokens.wide_tokens`.
      weight: from `kernel_weight`.
      norm_scale: weights of an RMS norm before the rotation; None for no norm.
      epsilon: added to the mean square in the norm.
      residual: in `out_dtype`, a row for each token; its leading axes need not be those of the tokens.
      gated: the weight is two matrices of one size, and their outputs become `silu(first) · second`, half as many.
      out_dtype: of the result.
      implementation: as the two ops take it.

    Returns:
      `[*tokens, weight.out_features]`, or half as many columns if `gated`.

    Raises:
      TwlaError: the requested implementation cannot be used.
    """
    tokens = x if isinstance(x, AttentionSplits) else x.reshape(-1, x.shape[-1])
    n = weight.out_features // (2 if gated else 1)
    added = None if residual is None else residual.reshape(-1, n)
    options = {"epsilon": epsilon, "gated": gated, "out_dtype": out_dtype}
    two_ops = functools.partial(reference.quantized_linear, implementation=implementation, **options)
    operands = (tokens, rotation, settings, weight, norm_scale, added)
    reason = gpu_linear.obstacle(tokens, rotation, weight, gated=gated, wide=settings is None)
    if implementation in ("xla", "tpu") or reason:
        y = two_ops(*operands)
    else:
        fused = functools.partial(gpu.quantized_linear, **options)
        y = dispatch("quantized_linear", implementation, two_ops, {"gpu": fused}, {}, *operands)
    return y if isinstance(x, AttentionSplits) else y.reshape(*x.shape[:-1], n)
