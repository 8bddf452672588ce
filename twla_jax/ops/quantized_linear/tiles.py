"""Tile sizes of the one-kernel linear, by rule from the shape."""

import dataclasses
import itertools

from twla_jax.ops.ternary_matmul.tiles import STREAMING_MULTIPROCESSORS
from twla_jax.packing import PLANE

_MEMORY = 226 * 1024  # bytes that the blocks of a multiprocessor of an H100 share
MOST_ROWS = 256  # of a block: what the copy engine takes at once, and what four warps have registers for
WARPGROUPS = 4  # of a multiprocessor's blocks, at most
_LEAST_ROWS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows of a block in each part of the matrix, warpgroups that share its columns, and tiles each has under way."""

    rows: int
    warpgroups: int
    stages: int


def tiles(rows: int, parts: int, columns: int, other: int) -> Tiles:
    """Tiles for `parts` matrices of `rows` each by `512·columns`, beside `other` bytes of shared memory.

    One block for each multiprocessor, if its rows are not too many, so that all are done at once; with all its weights
    under way from the beginning, if they fit. Else there are two to each.

    Raises:
      ValueError: there is no room for a single tile.
    """
    for waves in itertools.count(1):
        each = 8 * -(-rows // (8 * STREAMING_MULTIPROCESSORS * waves))
        resident = min(waves, 2)
        warpgroups = min(WARPGROUPS // resident, columns)
        if each <= min(MOST_ROWS // parts, 128 * warpgroups):  # a thread finishes a row
            break
    each = max(each, _LEAST_ROWS // parts)
    slot = parts * each * (PLANE + 16)
    room = (_MEMORY // resident - other) // (slot * warpgroups)
    if room < 1:
        raise ValueError(f"{other} bytes leave no room for tiles of {slot}")
    stages = min(room, -(-columns // warpgroups))
    return Tiles(rows=each, warpgroups=warpgroups, stages=stages)
