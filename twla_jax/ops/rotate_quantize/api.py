"""Computes, from the residual stream, the codes that a quantised linear reads: the public entry of this op."""

import dataclasses
import functools

from jaxtyping import Array, Float, Float32

from twla_jax.ops.dispatch import Implementation, dispatch
from twla_jax.ops.rotate_quantize import gpu, reference, tpu
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.tokens import QuantizedTokens


def rotate_quantize(
    x: Float[Array, "*tokens width"],
    rotation: KernelRotation | None,
    settings: Float32[Array, " 3"] | None,
    *,
    norm_scale: Float[Array, " m"] | None = None,
    epsilon: float = 0.0,
    gated: bool = False,
    implementation: Implementation | None = None,
) -> QuantizedTokens:
    """Return the tokens' codes and their sums, after an RMS norm if `norm_scale` is given and the rotation if any.

    The rotation computes in `x.dtype`, as `kotms.rotate` does; a kernel may round its sums differently, so that a few
    codes differ by one.

    Args:
      x: as wide as the rotation, or, if `gated`, twice as wide.
      rotation: of the input; None for none.
      settings: from `quantizer_settings`; None for codes of 16 bits, see `tokens.wide_tokens`.
      norm_scale: the norm's weights.
      epsilon: added to the mean square in the norm.
      gated: the tokens are the outputs of an MLP's gate and, after them, those of its up linear; `silu(gate) · up`,
        each step rounded to `x.dtype`, takes their place before anything else.
      implementation: `xla`, `gpu` or `tpu`; None takes the platform's kernel, or the reference where that cannot be
        used, which is logged.

    Returns:
      Codes `[*tokens, m]`, scales and zero points `[*tokens]`, and sums `[*tokens, groups]`.

    Raises:
      TwlaError: the requested implementation cannot be used.
    """
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    options = {"epsilon": epsilon, "gated": gated}
    tokens = dispatch(
        "rotate_quantize",
        implementation,
        functools.partial(reference.rotate_quantize, **options),
        {
            "gpu": functools.partial(gpu.rotate_quantize, **options),
            "tpu": functools.partial(tpu.rotate_quantize, **options),
        },
        {
            "gpu": gpu.obstacle(x, rotation, gated=gated),
            "tpu": tpu.obstacle(x.dtype, rotation, wide=settings is None),
        },
        x,
        rotation,
        settings,
        norm_scale,
    )
    lead = (2, *lead) if tokens.wide else lead
    return dataclasses.replace(
        tokens,
        codes=tokens.codes.reshape(*lead, -1),
        scale=tokens.scale.reshape(lead),
        zero_point=tokens.zero_point.reshape(lead),
        sums=tokens.sums.reshape(*lead, -1),
    )
