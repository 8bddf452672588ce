"""Packs ternary codes into bytes: 2 bits a weight in memory, base 3 on disk.

`U = T + 1 ∈ {0, 1, 2}` is what is stored, so that neither unpacking nor an integer matmul on the codes needs a
subtraction.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt8

from twla_jax.core.arrays import AnyArray

TILE = 512  # columns of one planar tile: byte c holds columns c, c+128, c+256 and c+384
PLANE = TILE // 4
TRITS_PER_BYTE = 5  # 3**5 = 243 values fit a byte: 1.6 bits a trit


def packed_width(in_features: int) -> int:
    """Return the bytes that a row of `in_features` codes takes in memory: a quarter, rounded up once."""
    tiles, rest = divmod(in_features, TILE)
    return tiles * PLANE + -(-rest // 4)


def pack(codes: Int8[AnyArray, "*batch n m"]) -> UInt8[Array, "*batch n bytes"]:
    """Pack codes `[..., n, m]` in {-1, 0, 1} at 2 bits each, planar inside tiles of 512 columns.

    A planar tile unpacks by shift and mask alone into four contiguous runs of columns, which is what a matmul kernel
    wants. The last tile is as wide as the columns that are left (rounded up to a multiple of 4), so that 576 columns
    take 144 bytes and not 256.
    """
    *lead, m = codes.shape
    unsigned = (codes + 1).astype(jnp.uint8)
    full = m // TILE * TILE
    rest = -(-(m - full) // 4) * 4
    unsigned = jnp.pad(unsigned, [(0, 0)] * len(lead) + [(0, full + rest - m)])
    return jnp.concatenate(
        [
            _merge_planes(unsigned[..., :full].reshape(*lead, full // TILE, 4, PLANE)).reshape(
                *lead, full // 4
            ),
            _merge_planes(unsigned[..., full:].reshape(*lead, 4, rest // 4)),
        ],
        axis=-1,
    )


def unpack(packed: UInt8[AnyArray, "*batch n bytes"], in_features: int) -> UInt8[Array, "*batch n m"]:
    """Return `U = T + 1 ∈ {0, 1, 2}`, `[..., n, in_features]`, of codes that `pack` packed."""
    lead = packed.shape[:-1]
    tiles, rest = divmod(in_features, TILE)
    planar = packed[..., : tiles * PLANE].reshape(*lead, tiles, PLANE)
    main = _split_planes(planar).reshape(*lead, tiles * TILE)
    if not rest:
        return main
    tail = _split_planes(packed[..., tiles * PLANE :])
    tail = tail.reshape(*lead, tail.shape[-2] * tail.shape[-1])[..., :rest]
    return jnp.concatenate([main, tail], axis=-1) if tiles else tail


def pack_base3(
    packed: UInt8[AnyArray, "*batch n bytes"], in_features: int
) -> UInt8[Array, "*batch n fifths"]:
    """Repack 2-bit codes at five trits a byte, `ceil(in_features / 5)` bytes a row: the layout on disk."""
    trits = unpack(packed, in_features)
    lead = trits.shape[:-1]
    trits = jnp.pad(trits, [(0, 0)] * len(lead) + [(0, -in_features % TRITS_PER_BYTE)])
    trits = trits.reshape(*lead, -1, TRITS_PER_BYTE)
    return (trits * 3 ** jnp.arange(TRITS_PER_BYTE, dtype=jnp.uint8)).sum(-1, dtype=jnp.uint8)


def unpack_base3(
    stored: UInt8[AnyArray, "*batch n fifths"], in_features: int
) -> UInt8[Array, "*batch n bytes"]:
    """Return the 2-bit planar codes of rows that `pack_base3` stored at five trits a byte."""
    trits = jnp.asarray(stored)[..., None] // 3 ** jnp.arange(TRITS_PER_BYTE, dtype=jnp.uint8) % 3
    trits = trits.reshape(*stored.shape[:-1], -1)[..., :in_features]
    return pack(trits.astype(jnp.int8) - 1)


def pack_bits(codes: UInt8[AnyArray, "*rows m"], bits: int) -> UInt8[Array, "*rows bytes"]:
    """Pack integers in `[0, 2**bits)` without gaps, lowest bit first, `ceil(m·bits / 8)` bytes a row, as on disk."""
    single = ((jnp.asarray(codes)[..., None] >> jnp.arange(bits, dtype=jnp.uint8)) & 1).reshape(
        *codes.shape[:-1], -1
    )
    single = jnp.pad(single, [(0, 0)] * (single.ndim - 1) + [(0, -single.shape[-1] % 8)])
    weights = jnp.uint8(1) << jnp.arange(8, dtype=jnp.uint8)
    return (single.reshape(*single.shape[:-1], -1, 8) * weights).sum(-1, dtype=jnp.uint8)


def unpack_bits(stored: UInt8[AnyArray, "*rows bytes"], bits: int, width: int) -> UInt8[Array, "*rows m"]:
    """Return the integers `[..., n, width]` of rows that `pack_bits` packed."""
    single = ((jnp.asarray(stored)[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1).reshape(
        *stored.shape[:-1], -1
    )
    single = single[..., : width * bits].reshape(*stored.shape[:-1], width, bits)
    return (single << jnp.arange(bits, dtype=jnp.uint8)).sum(-1, dtype=jnp.uint8)


def _merge_planes(planes: AnyArray) -> Array:
    shifted = jnp.asarray(planes) << (2 * jnp.arange(4, dtype=jnp.uint8))[:, None]
    return shifted.sum(axis=-2, dtype=jnp.uint8)


def _split_planes(packed: AnyArray) -> Array:
    return (jnp.asarray(packed)[..., None, :] >> (2 * jnp.arange(4, dtype=jnp.uint8))[:, None]) & 3
