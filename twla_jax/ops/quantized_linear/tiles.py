"""Tile sizes of the one-kernel linear, by rule from the shape."""

import dataclasses

from twla_jax.ops.ternary_matmul.tiles import MULTIPROCESSOR_MEMORY, STREAMING_MULTIPROCESSORS, slot_bytes

# Bytes that a multiprocessor's blocks have under way of weights: more would only stand in the way of the token.
_UNDER_WAY = 104 * 1024
MOST_ROWS = 256  # of a block: what the copy engine takes at once, and what four warps have registers for
MOST_WARPGROUPS = 4  # of a block
_WARPGROUPS = 2  # of a block whose token does not take more to turn
_LEAST_ROWS = 32
_LEAST_STAGES = 2  # where there is room: else nothing would be under way while a tile is multiplied


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows of a block in each part of the matrix, warpgroups that share its columns, and tiles each has under way."""

    rows: int
    warpgroups: int
    stages: int


def tiles(rows: int, parts: int, columns: int, lines: int, other: int) -> Tiles:
    """Tiles for `parts` matrices of `rows` each by `512·columns`, beside `other` bytes of shared memory.

    One block for each multiprocessor, if its rows are not too many, so that all are done at once; else there are two to
    each. `lines` is how many warpgroups it takes at least to turn the token.

    Raises:
      ValueError: there is no room for a single tile.
    """
    warpgroups = max(min(_WARPGROUPS, columns), lines)
    waves = 0
    while True:
        waves += 1
        resident = min(waves, 2)
        each = max(8 * -(-rows // (8 * STREAMING_MULTIPROCESSORS * waves)), _LEAST_ROWS // parts)
        slot = parts * slot_bytes(each)
        room, under_way = (
            memory // (slot * warpgroups)
            for memory in (MULTIPROCESSOR_MEMORY // resident - other, _UNDER_WAY // resident)
        )
        room = min(room, max(under_way, _LEAST_STAGES))
        if room > 0 and each <= min(MOST_ROWS // parts, 128 * warpgroups):  # a thread finishes a row
            return Tiles(rows=each, warpgroups=warpgroups, stages=min(room, -(-columns // warpgroups)))
        if room < 1 and each * parts == _LEAST_ROWS:
            raise ValueError(f"{other} bytes leave no room for tiles of {slot}")
