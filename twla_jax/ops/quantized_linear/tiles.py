"""Tile sizes of the one-kernel linear, by rule from the shape."""

import dataclasses

from twla_jax.ops.ternary_matmul.tiles import STREAMING_MULTIPROCESSORS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Warpgroups that share a block's columns, and tiles of 512 columns each has under way."""

    warpgroups: int
    stages: int


def tiles(rows: int, columns: int) -> Tiles:
    """Tiles for a matrix of `rows` by `512·columns`: what an H100 is fastest with at 4096 to 22016 rows.

    A third tile under way is worth more than a fourth, with which fewer blocks share a multiprocessor.
    """
    warpgroups = min(columns, 1 if rows // 64 >= STREAMING_MULTIPROCESSORS else 2)
    return Tiles(warpgroups=warpgroups, stages=min(3, -(-columns // warpgroups)))
