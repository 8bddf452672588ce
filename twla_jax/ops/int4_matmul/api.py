"""`x Ŵᵀ + b` with weights that stay packed at four bits."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.int4_matmul.weight import Int4Weight
from twla_jax.ops.ternary_matmul.api import packed_matmul
from twla_jax.ops.tokens import QuantizedTokens


def int4_matmul(
    x: Float[Array, "*tokens m"] | QuantizedTokens,
    weight: Int4Weight,
    *,
    out_dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "*tokens n"]:
    """`x Ŵᵀ + b` for float tokens (weight-only, float32 sums), or for quantised ones (int8 × int4, int32 sums).

    The kernels are those of `ternary_matmul`, with two codes in a byte in place of four; so are arguments and errors.

    Args:
      x: floats, of which the kernels take bf16 alone, or `QuantizedTokens`.
      weight: from `int4_weight`.
    Returns:
      `[*tokens, weight.out_features]`.
    """
    return packed_matmul("int4_matmul", x, weight, out_dtype, implementation)
