"""Tile sizes of the ternary matmul, by rule from the shape."""

import dataclasses

_SHARED_MEMORY = 220 * 1024  # bytes a block of an H100 may take, less what barriers need
_STREAMING_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTiles:
    """Tokens and weight rows of a block, warpgroups that share its columns, and tiles of 512 columns under way each."""

    tokens: int
    rows: int
    warpgroups: int
    stages: int


def gpu_tiles(t: int, rows: int, tiles: int, itemsize: int) -> GpuTiles:
    """Tiles for t tokens and a matrix of `rows` by `512·tiles`, whose activations take `itemsize` bytes a value."""
    tokens = min(32, -(-t // 8) * 8)
    block = 64
    # As many blocks a multiprocessor as there are, up to three: one that waits for its turn leaves others idle.
    together = min(3, -(-rows // (block * _STREAMING_MULTIPROCESSORS)))
    # What registers allow: about 100 for each of 512 threads at 8 tokens, twice that at more.
    warpgroups = max(1, min(4 // together // (1 if tokens == 8 else 2), tiles))
    slot = block * 128 + tokens * 512 * itemsize + 8 * block * 2
    left = _SHARED_MEMORY // together - warpgroups * tokens * block * 4
    stages = max(1, min(-(-tiles // warpgroups), left // (slot * warpgroups)))
    return GpuTiles(tokens=tokens, rows=block, warpgroups=warpgroups, stages=stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """Tokens and weight rows of a block."""

    tokens: int
    rows: int


def tpu_tiles(tokens: int, rows: int) -> TpuTiles:
    """Tiles for so many tokens and weight rows, a multiple of 128."""
    block = next(size for size in (512, 384, 256, 128) if rows % size == 0)
    return TpuTiles(tokens=min(256, -(-tokens // 32) * 32), rows=block)
