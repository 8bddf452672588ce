"""Tile sizes of products whose weights come through rings, by rule."""

import dataclasses

from twla_jax.core.packing import PLANE
from twla_jax.ops.ternary_matmul.tile_configs import (
    MULTIPROCESSOR_MEMORY,
    STREAMING_MULTIPROCESSORS,
    tile_bytes,
)

MOST_ROWS = 256  # of a block: what the copy engine takes at once, and what four warps have registers for
MOST_WARPGROUPS = 4  # of a block
WARPGROUPS = 2  # of a block, unless it takes more
_LEAST_ROWS = 32
_COPY_BYTES = 16 * 1024  # from which on a copy of several tiles is not worth waiting for
_LEAST_STAGES = 2  # where there is room: else nothing would be under way while a tile is multiplied


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows of a block in each part of the matrix, warpgroups that share its columns, and copies each has under way.

    A copy is of so many tiles `together`: one where they go through a ring, more where all have a place of their own.
    """

    rows: int
    warpgroups: int
    stages: int
    together: int = 1

    @property
    def ahead(self) -> int:
        """Copies that are under way before a token is there, which has to share the memory's time with them."""
        return -(-self.stages // 2)


def tiles(
    rows: int, parts: int, columns: int, lines: int, other: int, *, of_row: int = 0, under_way: int
) -> Tiles:
    """Tiles for `parts` matrices of `rows` each by `512·columns`, beside `other` bytes of shared memory.

    Each of a block's rows takes `of_row` more, and twice as many where there are but 32.

    One block for each multiprocessor, which takes all its rows at once if they are not too many, else in passes.
    `lines` is how many warpgroups a block has at least, and `under_way` how many bytes of weights it asks for ahead.

    Raises:
      ValueError: there is no room for a single tile.
    """
    warpgroups = max(min(WARPGROUPS, columns), lines)
    passes = 0
    while True:
        passes += 1
        each = max(8 * -(-rows // (8 * STREAMING_MULTIPROCESSORS * passes)), _LEAST_ROWS // parts)
        slot, own = parts * tile_bytes(each), -(-columns // warpgroups)
        beside = other + min(passes, 2) * of_row * parts * max(each, 2 * _LEAST_ROWS // parts)
        room = (MULTIPROCESSOR_MEMORY - beside) // (slot * warpgroups)
        allowed = each <= min(MOST_ROWS // parts, 128 * warpgroups)  # a thread finishes a row
        together = _together(each, own) if parts == 1 and passes == 1 else 1
        stages = -(-own // together)
        if passes == 1 and allowed and stages * together <= room and columns * slot <= under_way:
            return Tiles(rows=each, warpgroups=warpgroups, stages=stages, together=together)
        asked = under_way // (slot * warpgroups)
        room = min(room, max(asked, _LEAST_STAGES))
        if allowed and room > 0 and (passes == 1 or asked >= _LEAST_STAGES or each * parts == _LEAST_ROWS):
            return Tiles(rows=each, warpgroups=warpgroups, stages=min(room, own * passes))
        if room < 1 and each * parts == _LEAST_ROWS:
            raise ValueError(f"{other} bytes leave no room for tiles of {slot}")


def under_way(tiles: Tiles, parts: int) -> int:
    """Bytes of a block's weights that there is room for."""
    return tiles.warpgroups * tiles.stages * tiles.together * parts * tile_bytes(tiles.rows)


def _together(each: int, tiles: int) -> int:
    """Of so many tiles of a block's rows that a warpgroup has to begin copies of, how many in one of them.

    To begin copies keeps it from its token, 120 cycles each; but the first tiles are not to wait for the last.
    """
    return -(-tiles // max(-(-tiles * each * PLANE // _COPY_BYTES), 2))
