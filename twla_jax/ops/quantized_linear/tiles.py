"""Tile sizes of the one-kernel linear, by rule from the shape."""

import dataclasses

from twla_jax.ops.ternary_matmul.tiles import integer_tiles

_WIDE = 64 * 64  # activations whose rotation needs no more registers than four warpgroups leave each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Warpgroups that share a block's columns, and tiles of 512 columns each has under way."""

    warpgroups: int
    stages: int


def tiles(activations: int, rows: int, columns: int) -> Tiles:
    """Tiles for a token of so many activations and a matrix of `rows` by `512·columns`."""
    warpgroups = integer_tiles(1, rows, columns).warpgroups
    if activations > _WIDE:
        warpgroups = min(warpgroups, 2)
    return Tiles(warpgroups=warpgroups, stages=min(4, -(-columns // warpgroups)))
