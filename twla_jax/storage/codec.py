"""Packs codes for the disk: five trits in a byte, integers without gaps."""

import dataclasses
import functools
import math
from typing import Any

import jax

from twla_jax.core import packing


@dataclasses.dataclass(frozen=True)
class _Trits:
    """Rows of 2-bit codes in memory, of five trits a byte on disk."""

    in_features: int

    @property
    def width(self) -> int:
        return packing.packed_width(self.in_features)

    def pack(self, codes: jax.Array) -> jax.Array:
        return packing.pack_base3(codes, self.in_features)

    def unpack(self, stored: jax.Array) -> jax.Array:
        return packing.unpack_base3(stored, self.in_features)


@dataclasses.dataclass(frozen=True)
class _Integers:
    """Rows of `width` integers, one a byte in memory, without gaps on disk."""

    bits: int
    width: int

    def pack(self, codes: jax.Array) -> jax.Array:
        return packing.pack_bits(codes, self.bits)

    def unpack(self, stored: jax.Array) -> jax.Array:
        return packing.unpack_bits(stored, self.bits, self.width)


def codec_of(kind: str, static: dict[str, Any], part: str) -> _Trits | _Integers | None:
    """Return the codec of an array that does not lie on the disk as it is in memory, else None."""
    if kind == "grouped" and part == "residual_codes":
        return _Trits(static["salient_width"])
    if kind in ("ternary", "grouped") and part in ("codes", "residual_codes"):
        return _Trits(static["in_features"])
    if kind == "integer" and part == "codes":
        return _Integers(static["bits"], static["in_features"])
    if kind == "integer" and part == "zero_point":
        return _Integers(static["bits"], math.ceil(static["in_features"] / static["group_size"]))
    return None


@functools.partial(jax.jit, static_argnums=1)
def pack_stored(codes: jax.Array, codec: _Trits | _Integers) -> jax.Array:
    """Return codes as they lie on the disk from those in memory."""
    return _by_layer(codec.pack, codes)


def unpack_stored(stored: jax.Array, codec: _Trits | _Integers) -> jax.Array:
    """Return codes as they are in memory from those on the disk; inverts `pack_stored`."""
    return _by_layer(codec.unpack, stored)


def _by_layer(function: Any, stack: jax.Array) -> jax.Array:
    """Apply a function to one matrix at a time: in between, a trit takes a byte, too much for a whole stack."""
    return jax.lax.map(function, stack) if stack.ndim > 2 else function(stack)
