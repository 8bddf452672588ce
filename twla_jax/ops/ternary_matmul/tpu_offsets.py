"""Scales sums of few tokens on TPUs where α and μ are bytes: all tiles' μ by one product, all α laid out as floats.

A pair of scales is an int16, so two of its bits' bytes are two rows, μ and α: as an operand of the matrix unit, the
pairs need no unpacking.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int16, Num

from twla_jax.ops.ternary_matmul import tpu_unpack
from twla_jax.ops.ternary_matmul.weight import fields_of_pair


def totals(sums: Num[Array, "t groups"]) -> Num[Array, "1 t two_groups"]:
    """Return the sums of tokens over groups as `offsets` takes them: zeros meet the bytes of α."""
    return jnp.pad(sums[..., None], ((0, 0), (0, 0), (0, 1))).reshape(1, len(sums), -1)


def offsets(
    of_tokens: Num[Array, "t two_groups"], bits: Int16[Array, "tiles planes rows"], operand
) -> Float32[Array, "t rows"]:
    """Return `Σ μ·total` over all groups, from `totals` and pairs of scales.

    Args:
      of_tokens: int32 sums of at most 2¹⁴, which become two int8 parts, or floats.
      bits: the pairs.
      operand: what the matrix unit multiplies.
    """
    rows = pltpu.bitcast(bits.reshape(-1, bits.shape[-1]), jnp.int8)
    if jnp.issubdtype(of_tokens.dtype, jnp.floating):
        return _product(of_tokens, rows.astype(jnp.float32), lax.Precision.HIGHEST)
    upper = (of_tokens + 128) >> 8
    parts = jnp.concatenate([upper, of_tokens - (upper << 8)])
    both = _product(parts.astype(operand), rows.astype(operand), None)
    return (256 * both[: len(upper)] + both[len(upper) :]).astype(jnp.float32)


def alphas(bits: Int16[Array, "tiles planes rows"]) -> Float32[Array, "groups rows"]:
    """Return α of all groups, divided by what codes are too large by where they are in their byte."""
    alpha, _ = fields_of_pair(bits.reshape(-1, bits.shape[-1]).astype(jnp.int32))
    plane = lax.rem(lax.broadcasted_iota(jnp.int32, (len(alpha), 1), 0), jnp.int32(bits.shape[1]))
    factor = sum(jnp.where(plane == i, 4.0 ** -tpu_unpack.place(i), 0) for i in range(bits.shape[1]))
    return alpha.astype(jnp.float32) * factor


def _product(left, right, precision) -> Array:
    exact = tpu_unpack.exact(left.dtype)
    dimensions = (((1,), (0,)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=exact)
