"""Unpacks codes and scales on TPUs: whole bytes in 32-bit words, as the vector unit has no shifts of bytes."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Int8, Int16, Int32, UInt8

from twla_jax.core.packing import PLANE
from twla_jax.ops.ternary_matmul.weight import PackedWeight, fields_of_pair

_ONES = 0x01010101


def words(codes: UInt8[Array, "rows 128"]) -> Int32[Array, "words 128"]:
    """Return the bytes of four rows in a word."""
    return pltpu.bitcast(codes, jnp.int32)


def place(plane: int) -> int:
    """Return at which code's place in a byte one of 2 bits may stay: in the two upper bits, it would be the sign."""
    return min(plane, 2)


def plane_codes(
    packed: Int32[Array, "words 128"], plane: int, weight: PackedWeight, *, in_place: bool = False
) -> Int8[Array, "rows 128"]:
    """Return a plane's codes as int8, with their offset.

    Args:
      packed: from `words`.
      plane: of the codes.
      weight: whose codes these are.
      in_place: codes of 2 bits stay where they are, which saves shifts: they are `4^place(plane)` times as large.
    """
    if weight.bits == 8:  # int8 cannot hold the code, so its bytes hold 128 less
        return pltpu.bitcast(packed ^ _signed(0x80 * _ONES), jnp.int8)
    at = place(plane) if in_place else 0
    shift = weight.bits * (plane - at)
    mask = _signed((2**weight.bits - 1) * _ONES << weight.bits * at)
    moved = lax.shift_right_logical(packed, jnp.int32(shift)) if shift else packed
    return pltpu.bitcast(moved & mask, jnp.int8)


def code_offset(weight: PackedWeight) -> int:
    """Return what the codes of `plane_codes` are too large by."""
    return 0 if weight.bits == 8 else weight.offset


def scales(
    bits: Int16[Array, "parameters rows"], weight: PackedWeight
) -> tuple[Float32[Array, "planes rows"], Float32[Array, "planes rows"]]:
    """Return α and μ of a tile's planes, or of rows that have one of each."""
    if weight.paired:
        alpha, mu = fields_of_pair(bits.astype(jnp.int32))
        return alpha.astype(jnp.float32), mu.astype(jnp.float32)
    half = len(bits) // 2
    return _float16_bits(bits[:half]), _float16_bits(bits[half:])


def weights(
    packed: Int32[Array, "words 128"], table: Int32[Array, "words 16"], plane: int
) -> Int8[Array, "rows 128"]:
    """Return a plane's weights `α·U + μ`, whole numbers of a row's steps, of codes with paired scales.

    A word has the bytes of four rows, so it is not multiplied, but masks choose one of three values.

    Args:
      packed: from `words`.
      table: from `choices`.
      plane: of the codes.
    """
    none, one, two = (table[:, 4 * i + plane : 4 * i + plane + 1] for i in range(3))
    low, high = (
        lax.shift_right_logical(packed, jnp.int32(2 * plane + i)) & jnp.int32(_ONES) for i in range(2)
    )
    return pltpu.bitcast(none ^ (_all_ones(low) & one) ^ (_all_ones(high) & two), jnp.int8)


def choices(bits: Int16[Array, "4 rows"]) -> Int32[Array, "words 16"]:
    """Return bytes of four rows in a word: μ of four planes, what turns it into α + μ by XOR, and into 2α + μ."""
    alpha, mu = fields_of_pair(bits.astype(jnp.int32))
    table = jnp.concatenate([mu, mu ^ (alpha + mu), mu ^ (2 * alpha + mu), mu])  # the last one fills up
    return pltpu.bitcast(table.T.astype(jnp.int8), jnp.int32)


def operand(dtype):
    """Return what the matrix unit multiplies: int8 where it can, else bf16, which holds codes and sums exactly."""
    if dtype == jnp.int8 and pltpu.is_tpu_device():
        return jnp.int8 if pltpu.get_tpu_info().is_matmul_supported(jnp.int8, jnp.int8) else jnp.bfloat16
    return dtype


def planes_together() -> int:
    """Return how many planes fill the matrix unit's columns."""
    return pltpu.get_tpu_info().mxu_column_size // PLANE if pltpu.is_tpu_device() else 1


def exact(dtype):
    """Return the type of sums of products of an operand."""
    return jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32


def _all_ones(low_bits: jax.Array) -> jax.Array:
    """Return 255 for every byte that is 1."""
    return (low_bits << 8) - low_bits


def _signed(word: int) -> jax.Array:
    word &= 0xFFFFFFFF
    return jnp.int32(word - 2**32 if word >= 2**31 else word)


def _float16_bits(bits: jax.Array) -> jax.Array:
    """Return float32 from the bits of float16, a type the vector unit does not have."""
    bits = bits.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    value = jnp.where(magnitude < 1024, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits < 0, -value, value)
