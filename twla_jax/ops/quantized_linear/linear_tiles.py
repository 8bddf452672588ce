"""Chooses the tile sizes of the one-kernel linear: measured for some shapes, by rule for the rest."""

from twla_jax.ops.hopper.limits import MULTIPROCESSOR_MEMORY
from twla_jax.ops.ternary_matmul import ring_tiles
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig

# Bytes of weights that a block prefetches: more would only delay the token.
_IN_FLIGHT = 96 * 1024
# For one token, by (rows of each matrix, matrices, column tiles): configs that `benchmarks/tune.py` found faster.
TUNED = {
    (4096, 1, 24): RingTileConfig(rows=32, warpgroups=2, stages=10),  # Qwen3-8B's down: 8.0 instead of 8.4
}


def tile_config(
    rows: int, matrices: int, columns: int, lines: int, other: int, *, tokens: int = 1
) -> RingTileConfig:
    """Return the config in `TUNED`, if there is one and it fits; else that of the rule `ring_tiles.tile_config`.

    `lines` is how many warpgroups the token's rotation takes at least.

    Raises:
      ValueError: there is no room for a single tile.
    """
    tuned = TUNED.get((rows, matrices, columns)) if tokens == 1 else None
    if (
        tuned
        and tuned.warpgroups >= lines
        and ring_tiles.bytes_in_flight(tuned, matrices) + other <= MULTIPROCESSOR_MEMORY
    ):
        return tuned
    return ring_tiles.tile_config(rows, matrices, columns, lines, other, in_flight=_IN_FLIGHT)
