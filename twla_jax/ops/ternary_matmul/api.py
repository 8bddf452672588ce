"""`x Ŵᵀ + b` with ternary weights that stay packed at two bits."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from twla_jax.ops.dispatch import Implementation, dispatch
from twla_jax.ops.ternary_matmul import gpu, reference, tpu
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import QuantizedTokens, group_sums


def ternary_matmul(
    x: Float[Array, "*tokens m"] | QuantizedTokens,
    weight: KernelWeight,
    *,
    out_dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "*tokens n"]:
    """`x Ŵᵀ + b` for quantised tokens (int8 × ternary, int32 sums), or for bf16 ones (weight-only, float32 sums).

    Per-group (α, μ): the sum over 128 columns is scaled and added up in float32, in no particular order of groups.

    Args:
      x: bf16 (other floats are rounded to it) or `QuantizedTokens`.
      weight: from `kernel_weight`.
      out_dtype: of the result.
      implementation: `xla`, `gpu` or `tpu`; None takes the platform's kernel, or the reference where that cannot be
        used, which is logged.
    Returns:
      `[*tokens, weight.out_features]`.
    Raises:
      TwlaError: the implementation asked for cannot be used.
    """
    if isinstance(x, QuantizedTokens):
        lead = x.codes.shape[:-1]
        operands = (
            x.codes.reshape(-1, weight.in_features),
            x.sums.reshape(-1, 4 * weight.tiles),
            x.scale.reshape(-1),
            x.zero_point.reshape(-1),
        )
    else:
        lead = x.shape[:-1]
        values = x.reshape(-1, weight.in_features).astype(jnp.bfloat16)
        operands = (values, group_sums(values), jnp.ones(len(values)), jnp.zeros(len(values)))
    y = dispatch(
        "ternary_matmul",
        implementation,
        functools.partial(reference.matmul, out_dtype=out_dtype),
        {
            "gpu": functools.partial(gpu.matmul, out_dtype=out_dtype),
            "tpu": functools.partial(tpu.matmul, out_dtype=out_dtype),
        },
        {},
        *operands,
        weight,
    )
    return y[:, : weight.out_features].reshape(*lead, weight.out_features)
