"""Computes `x Ŵᵀ + b` with ternary weights that stay packed at two bits: the public entry of this op."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from twla_jax.ops.dispatch import Implementation, dispatch
from twla_jax.ops.ternary_matmul import gpu, reference, tpu
from twla_jax.ops.ternary_matmul.reference import in_two_parts
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import QuantizedTokens, group_sums


def ternary_matmul(
    x: Float[Array, "*tokens m"] | QuantizedTokens,
    weight: KernelWeight,
    residual: Float[Array, "*tokens n"] | None = None,
    *,
    out_dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "*tokens n"]:
    """Return `x Ŵᵀ + b` `[*tokens, n]` of quantised tokens (int32 sums), or of floats (float32 sums).

    With (α, μ) by groups, the sum over 128 columns is scaled by whole numbers of a row's step, and added up in int32;
    or in float32, in no particular order of groups.

    Args:
      x: `QuantizedTokens`, or floats, of which the kernels take bf16 alone.
      weight: from `kernel_weight`.
      residual: in `out_dtype`; the rounded result is added to it.
      out_dtype: of the result.
      implementation: `xla`, `gpu` or `tpu`; None takes the platform's kernel, or the reference where that cannot be
        used, which is logged.

    Returns:
      `[*tokens, weight.out_features]`.

    Raises:
      TwlaError: the requested implementation cannot be used.
    """
    wide = isinstance(x, QuantizedTokens) and x.wide
    if isinstance(x, QuantizedTokens):
        lead = x.codes.shape[1 if wide else 0 : -1]
        operands = (
            x.codes.reshape(-1, weight.in_features),
            x.sums.reshape(-1, 4 * weight.column_tiles),
            x.scale.reshape(-1),
            x.zero_point.reshape(-1),
        )
    else:
        lead = x.shape[:-1]
        values = x.reshape(-1, weight.in_features)
        operands = (values, group_sums(values), jnp.ones(len(values)), jnp.zeros(len(values)))
    y = dispatch(
        "ternary_matmul",
        implementation,
        functools.partial(in_two_parts(reference.matmul) if wide else reference.matmul, out_dtype=out_dtype),
        {
            "gpu": functools.partial(gpu.wide_matmul if wide else gpu.matmul, out_dtype=out_dtype),
            "tpu": functools.partial(in_two_parts(tpu.matmul) if wide else tpu.matmul, out_dtype=out_dtype),
        },
        dict.fromkeys(("gpu", "tpu"), _obstacle(operands[0].dtype)),
        *operands,
        weight,
        None if residual is None else residual.reshape(-1, weight.out_features),
    )
    return y.reshape(*lead, weight.out_features)


def _obstacle(dtype) -> str | None:
    return None if dtype in (jnp.int8, jnp.bfloat16) else f"activations are {dtype}, not bfloat16"
