"""Tile sizes of the one-kernel linear: measured for some shapes, by rule for the rest."""

import dataclasses

from twla_jax.ops.ternary_matmul.tiles import (
    MULTIPROCESSOR_MEMORY,
    ROWS,
    STREAMING_MULTIPROCESSORS,
    tile_bytes,
)
from twla_jax.packing import PLANE

# Bytes that a multiprocessor's blocks have under way of weights: more would only stand in the way of the token.
_UNDER_WAY = 96 * 1024
MOST_ROWS = 256  # of a block: what the copy engine takes at once, and what four warps have registers for
MOST_WARPGROUPS = 4  # of a block
_WARPGROUPS = 2  # of a block whose token does not take more to turn
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


# For one token, by rows of each part, parts, and columns of 512: what `benchmarks/tune.py` found faster than the rule.
TUNED = {
    (28672, 2, 16): Tiles(rows=80, warpgroups=2, stages=2),  # LLaMA-2-70B's gate,up: 46.8 µs instead of 52.5
    (4096, 1, 24): Tiles(rows=32, warpgroups=2, stages=10),  # Qwen3-8B's down: 8.0 instead of 8.4
}


def tiles(rows: int, parts: int, columns: int, lines: int, other: int, *, tokens: int = 1) -> Tiles:
    """Tiles for `parts` matrices of `rows` each by `512·columns`, beside `other` bytes of shared memory.

    Those of `TUNED`, if there are any and there is room; else by rule.

    One block for each multiprocessor, if its rows are not too many, so that all are done at once; else there are two to
    each. `lines` is how many warpgroups it takes at least to turn the token.

    Raises:
      ValueError: there is no room for a single tile.
    """
    tuned = TUNED.get((rows, parts, columns)) if tokens == 1 else None
    if tuned and tuned.warpgroups >= lines and _bytes(tuned, parts) + other <= MULTIPROCESSOR_MEMORY:
        return tuned
    warpgroups = max(min(_WARPGROUPS, columns), lines)
    waves = 0
    while True:
        waves += 1
        resident = min(waves, 2)
        each = max(8 * -(-rows // (8 * STREAMING_MULTIPROCESSORS * waves)), _LEAST_ROWS // parts)
        slot, own = parts * tile_bytes(each), -(-columns // warpgroups)
        memory, under_way = MULTIPROCESSOR_MEMORY // resident, _UNDER_WAY // resident
        room = (memory - other) // (slot * warpgroups)
        fits = each <= min(MOST_ROWS // parts, 128 * warpgroups)  # a thread finishes a row
        together = _together(rows, each, own) if parts == 1 else 1
        stages = -(-own // together)
        if fits and stages * together <= room and columns * slot <= under_way:
            return Tiles(rows=each, warpgroups=warpgroups, stages=stages, together=together)
        room = min(room, max(under_way // (slot * warpgroups), _LEAST_STAGES))
        if fits and room > 0:
            return Tiles(rows=each, warpgroups=warpgroups, stages=min(room, own))
        if room < 1 and each * parts == _LEAST_ROWS:
            raise ValueError(f"{other} bytes leave no room for tiles of {slot}")


def _bytes(tiles: Tiles, parts: int) -> int:
    """Of a block's weights under way."""
    return tiles.warpgroups * tiles.stages * tiles.together * parts * tile_bytes(tiles.rows)


def _together(rows: int, each: int, tiles: int) -> int:
    """Of so many tiles of a block's rows that a warpgroup has to begin copies of, how many in one of them.

    To begin copies keeps it from its token, 120 cycles each; but the first tiles are not to wait for the last.
    """
    cut = -(-rows // ROWS) * ROWS % each > 0  # then the copy engine does not bring several
    if tiles == 1 or cut:
        return 1
    return -(-tiles // max(-(-tiles * each * PLANE // _COPY_BYTES), 2))
