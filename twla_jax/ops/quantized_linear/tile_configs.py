"""Tile sizes of the one-kernel linear that were measured."""

from twla_jax.ops.ternary_matmul import ring_tiles
from twla_jax.ops.ternary_matmul.ring_tiles import Tiles
from twla_jax.ops.ternary_matmul.tile_configs import MULTIPROCESSOR_MEMORY

# Bytes of weights that a block asks for ahead: more would only stand in the way of the token.
_UNDER_WAY = 96 * 1024
# For one token, by rows of each part, parts, and columns of 512: what `benchmarks/tune.py` found faster than the rule.
TUNED = {
    (4096, 1, 24): Tiles(rows=32, warpgroups=2, stages=10),  # Qwen3-8B's down: 8.0 instead of 8.4
}


def tiles(rows: int, parts: int, columns: int, lines: int, other: int, *, tokens: int = 1) -> Tiles:
    """Those of `TUNED`, if there are any and there is room; else by rule: see `ring_tiles.tiles`.

    `lines` is how many warpgroups it takes at least to turn the token.

    Raises:
      ValueError: there is no room for a single tile.
    """
    tuned = TUNED.get((rows, parts, columns)) if tokens == 1 else None
    if (
        tuned
        and tuned.warpgroups >= lines
        and ring_tiles.under_way(tuned, parts) + other <= MULTIPROCESSOR_MEMORY
    ):
        return tuned
    return ring_tiles.tiles(rows, parts, columns, lines, other, under_way=_UNDER_WAY)
