"""From the residual stream to the codes that a quantised linear reads."""

import functools

from jaxtyping import Array, Float, Float32, Int32

from twla_jax.ops.dispatch import Implementation, dispatch
from twla_jax.ops.rotate_quantize import gpu, reference, tpu
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.tokens import QuantizedTokens


def rotate_quantize(
    x: Float[Array, "*tokens m"],
    rotation: KernelRotation,
    bits: Int32[Array, ""],
    clip: Float32[Array, ""],
    *,
    norm_scale: Float[Array, " m"] | None = None,
    epsilon: float = 0.0,
    implementation: Implementation | None = None,
) -> QuantizedTokens:
    """An RMS norm if there is a `norm_scale`, the rotation, and per-token codes with scale, zero point and sums.

    The rotation computes in `x.dtype`, as `kotms.rotate` does; a kernel may round its sums differently, so that a few
    codes differ by one. Bits and clip are data.

    Args:
      bits: 2 to 8.
      clip: share of the token's range that the codes span.
      norm_scale: the norm's weights.
      epsilon: what the norm adds to the mean square.
      implementation: `xla`, `gpu` or `tpu`; None takes the platform's kernel, or the reference where that cannot be
        used, which is logged.
    Raises:
      TwlaError: the implementation asked for cannot be used.
    """
    lead = x.shape[:-1]
    tokens = dispatch(
        "rotate_quantize",
        implementation,
        functools.partial(reference.rotate_quantize, epsilon=epsilon),
        {
            "gpu": functools.partial(gpu.rotate_quantize, epsilon=epsilon),
            "tpu": functools.partial(tpu.rotate_quantize, epsilon=epsilon),
        },
        {"gpu": gpu.obstacle(x.dtype, rotation), "tpu": tpu.obstacle(x.dtype, rotation)},
        x.reshape(-1, rotation.features),
        rotation,
        bits,
        clip,
        norm_scale,
    )
    return QuantizedTokens(
        codes=tokens.codes.reshape(x.shape),
        scale=tokens.scale.reshape(lead),
        zero_point=tokens.zero_point.reshape(lead),
        sums=tokens.sums.reshape(*lead, -1),
    )
