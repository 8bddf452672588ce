"""Computes `x Ŵᵀ` with integer weights that stay at four or eight bits: the public entry of this op."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from twla_jax.ops.dispatch import Implementation, dispatch
from twla_jax.ops.integer_matmul import gpu
from twla_jax.ops.integer_matmul.weight import IntegerWeight
from twla_jax.ops.ternary_matmul import reference, tpu
from twla_jax.ops.tokens import group_sums


def integer_matmul(
    x: Float[Array, "*tokens m"],
    weight: IntegerWeight,
    *,
    out_dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "*tokens n"]:
    """Return `x Ŵᵀ` `[*tokens, out_features]` of float tokens and packed integer weights, with float32 sums.

    It runs the weight-only kernels of `ternary_matmul` on longer codes. Codes are exact in bf16; a group's scale and
    zero point are applied to its sum in float32.

    Args:
      x: floats; the kernels take bf16 alone, and few tokens, since each block of tokens unpacks the weights again.
      weight: from `integer_weight`.
      out_dtype: of the result.
      implementation: `xla`, `gpu` or `tpu`; None takes the platform's kernel, or the reference where that cannot be
        used, which is logged.

    Returns:
      `[*tokens, weight.out_features]`.

    Raises:
      TwlaError: the requested implementation cannot be used.
    """
    values = x.reshape(-1, weight.in_features)
    kernels = {
        name: functools.partial(module.product, out_dtype=out_dtype)
        for name, module in (("gpu", gpu), ("tpu", tpu))
    }
    reason = None if x.dtype == jnp.bfloat16 else f"activations are {x.dtype}, not bfloat16"
    y = dispatch(
        "integer_matmul",
        implementation,
        lambda *operands: reference.product(*operands).astype(out_dtype),
        kernels,
        dict.fromkeys(kernels, reason),
        values,
        group_sums(values),
        weight,
    )
    return y[:, : weight.out_features].reshape(*x.shape[:-1], weight.out_features)
