"""Tile sizes of the ternary matmul, by rule from the shape."""

import dataclasses

_SHARED_MEMORY = 220 * 1024  # bytes a block of an H100 may take, less what barriers need
_STREAMING_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTiles:
    """Weight rows of a block, warpgroups that share its columns, and tiles each has under way."""

    rows: int
    warpgroups: int
    stages: int


def gpu_tiles(rows: int, tiles: int, tokens: int, planes: int, itemsize: int) -> GpuTiles:
    """Tiles for a matrix of `rows` by `128·planes·tiles` and blocks of so many tokens, of `itemsize` bytes a value."""
    block = 64
    warpgroups = 1
    while warpgroups < min(4, tiles) and rows // block * warpgroups < 2 * _STREAMING_MULTIPROCESSORS:
        warpgroups *= 2
    # Codes, tokens, scales and sums of a slot; parts and output of a block.
    slot = block * 128 + planes * (tokens * 128 * itemsize + 2 * block * 2 + tokens * 4)
    left = _SHARED_MEMORY - (warpgroups + 1) * tokens * block * 4
    stages = min(4, -(-tiles // warpgroups), left // (slot * warpgroups))
    return GpuTiles(rows=block, warpgroups=warpgroups, stages=stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """Tokens and weight rows of a block."""

    tokens: int
    rows: int


def tpu_tiles(tokens: int, rows: int) -> TpuTiles:
    """Tiles for so many tokens and weight rows, a multiple of 128."""
    block = next(size for size in (512, 384, 256, 128) if rows % size == 0)
    return TpuTiles(tokens=min(256, -(-tokens // 32) * 32), rows=block)
