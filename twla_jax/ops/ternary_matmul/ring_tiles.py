"""Chooses the tile sizes of products whose weights come through rings, by rule."""

import dataclasses

from twla_jax.core.packing import PLANE
from twla_jax.ops.hopper.limits import MULTIPROCESSOR_MEMORY, STREAMING_MULTIPROCESSORS, WARPGROUPS
from twla_jax.ops.ternary_matmul.tile_configs import tile_bytes

MOST_ROWS = 256  # of a block, which the copy engine takes at once and four warps have registers for
MOST_WARPGROUPS = 4  # of a block
_LEAST_ROWS = 32
_COPY_BYTES = 16 * 1024  # beyond which a copy of several tiles is not worth the wait
_LEAST_STAGES = 2  # where there is room: with one, nothing would be in flight while a tile is multiplied


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingTileConfig:
    """Describes a block's rows of each matrix, the warpgroups that share its columns, and each one's copies in flight.

    A copy is of `together` tiles: one where they go through a ring, more where all have a place of their own.
    """

    rows: int
    warpgroups: int
    stages: int
    together: int = 1

    @property
    def ahead(self) -> int:
        """Return the copies in flight before a token is there, which has to share the memory's time with them."""
        return -(-self.stages // 2)


def tile_config(
    rows: int, matrices: int, columns: int, lines: int, other: int, *, of_row: int = 0, in_flight: int
) -> RingTileConfig:
    """Return the config for `matrices` of `rows` each by `512·columns`, beside `other` bytes of shared memory.

    Each of a block's rows takes `of_row` more bytes, and twice as many where there are but 32.

    There is one block for each multiprocessor, which takes all its rows at once if they are not too many, else in
    passes. `lines` is how many warpgroups a block has at least, and `in_flight` how many bytes of weights it
    prefetches.

    Raises:
      ValueError: there is no room for a single tile.
    """
    warpgroups = max(min(WARPGROUPS, columns), lines)
    passes = 0
    while True:
        passes += 1
        each = max(8 * -(-rows // (8 * STREAMING_MULTIPROCESSORS * passes)), _LEAST_ROWS // matrices)
        slot, own = matrices * tile_bytes(each), -(-columns // warpgroups)
        beside = other + min(passes, 2) * of_row * matrices * max(each, 2 * _LEAST_ROWS // matrices)
        room = (MULTIPROCESSOR_MEMORY - beside) // (slot * warpgroups)
        allowed = each <= min(MOST_ROWS // matrices, 128 * warpgroups)  # a thread finishes a row
        together = _together(each, own) if matrices == 1 and passes == 1 else 1
        stages = -(-own // together)
        if passes == 1 and allowed and stages * together <= room and columns * slot <= in_flight:
            return RingTileConfig(rows=each, warpgroups=warpgroups, stages=stages, together=together)
        asked = in_flight // (slot * warpgroups)
        room = min(room, max(asked, _LEAST_STAGES))
        if allowed and room > 0 and (passes == 1 or asked >= _LEAST_STAGES or each * matrices == _LEAST_ROWS):
            return RingTileConfig(rows=each, warpgroups=warpgroups, stages=min(room, own * passes))
        if room < 1 and each * matrices == _LEAST_ROWS:
            raise ValueError(f"{other} bytes in use leave no room for tiles of {slot} bytes")


def bytes_in_flight(config: RingTileConfig, matrices: int) -> int:
    """Return the bytes of a block's weights that there is room for."""
    return config.warpgroups * config.stages * config.together * matrices * tile_bytes(config.rows)


def _together(each: int, tiles: int) -> int:
    """Return how many of a warpgroup's `tiles` one copy brings.

    To start copies keeps it from its token, 120 cycles each; but the first tiles are not to wait for the last.
    """
    return -(-tiles // max(-(-tiles * each * PLANE // _COPY_BYTES), 2))
