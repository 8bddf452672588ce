"""Tile sizes of the ternary matmul, by rule from the shape."""

import dataclasses

_SHARED_MEMORY = 220 * 1024  # bytes a block of an H100 may take, less what barriers need
_STREAMING_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTiles:
    """Weight rows of a block, warpgroups that share its columns, and tiles of 512 columns each has under way."""

    rows: int
    warpgroups: int
    stages: int


def gpu_tiles(rows: int, tiles: int, itemsize: int) -> GpuTiles:
    """Tiles for a matrix of `rows` by `512·tiles`, whose activations take `itemsize` bytes a value."""
    block = 128
    while block > 32 and rows // block < _STREAMING_MULTIPROCESSORS:
        block //= 2
    warpgroups = min(2, tiles)
    # Codes, tokens, scales and sums of a slot; parts and output of a block.
    slot = block * 128 + 16 * 512 * itemsize + 8 * block * 2 + 16 * 4 * 4
    left = _SHARED_MEMORY - (warpgroups + 1) * 16 * block * 4
    stages = min(4, -(-tiles // warpgroups), left // (slot * warpgroups))
    return GpuTiles(rows=block, warpgroups=warpgroups, stages=stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTiles:
    """Tokens and weight rows of a block, warpgroups that share its columns, and tiles of 512 each has under way."""

    tokens: int
    rows: int
    warpgroups: int
    stages: int


def decode_tiles(tokens: int, rows: int, tiles: int) -> DecodeTiles:
    """Tiles for so many tokens and a matrix of `rows` by `512·tiles`."""
    block = 8 if tokens <= 8 else 16
    # As many warpgroups as keep every multiprocessor busy, as far as there are tiles for them.
    warpgroups = 1
    while warpgroups < 4 and rows // 64 * warpgroups < 2 * _STREAMING_MULTIPROCESSORS and 2 * warpgroups <= tiles:
        warpgroups *= 2
    slot = 64 * 128 + block * 512 + 8 * 64 * 2  # codes, tokens and scales
    stages = min(4, -(-tiles // warpgroups), _SHARED_MEMORY // 2 // (slot * warpgroups))
    return DecodeTiles(tokens=block, rows=64, warpgroups=warpgroups, stages=stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """Tokens and weight rows of a block."""

    tokens: int
    rows: int


def tpu_tiles(tokens: int, rows: int) -> TpuTiles:
    """Tiles for so many tokens and weight rows, a multiple of 128."""
    block = next(size for size in (512, 384, 256, 128) if rows % size == 0)
    return TpuTiles(tokens=min(256, -(-tokens // 32) * 32), rows=block)
