"""Chooses the tile sizes of few tokens' products: measured for some shapes, by rule for the rest."""

from twla_jax.ops.hopper.limits import WARPGROUPS
from twla_jax.ops.ternary_matmul import ring_tiles
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig

# Bytes of weights that a block prefetches. With 96 KB, one token at 10240×8192 took 10.5 µs instead of 10.0.
_IN_FLIGHT = 66 * 1024
# Less is slower than `gpu_mma`: with 30 KB, sixteen tokens at 57344×8192 took 62.9 µs instead of 54.5.
_LEAST_IN_FLIGHT = 40 * 1024
# By (rows, column tiles, padded tokens): configs that `benchmarks/tune.py --few` found faster than the rule.
TUNED = {
    (22016, 8, 2): RingTileConfig(rows=56, warpgroups=2, stages=3),  # 10.5 µs instead of 10.7
    (22016, 8, 4): RingTileConfig(rows=56, warpgroups=2, stages=3),  # 10.8 instead of 11.3
    (22016, 8, 8): RingTileConfig(rows=56, warpgroups=2, stages=3),  # 11.3 instead of 11.6
    (4096, 22, 8): RingTileConfig(rows=32, warpgroups=3, stages=4),  # 7.5 instead of 8.1
}


def tile_config(rows: int, columns: int, tokens: int, other: int) -> RingTileConfig:
    """Return the config for `rows` by `512·columns`, and `tokens` padded as `gpu_layout.Columns` does.

    It leaves `other` bytes of shared memory free: see `ring_tiles.tile_config`.

    Raises:
      ValueError: there is too little room.
    """
    if tuned := TUNED.get((rows, columns, tokens)):
        return tuned
    of_row = 4 * WARPGROUPS * tokens  # of sums
    chosen = ring_tiles.tile_config(rows, 1, columns, 1, other, of_row=of_row, in_flight=_IN_FLIGHT)
    in_flight = ring_tiles.bytes_in_flight(chosen, 1)
    if in_flight < min(_LEAST_IN_FLIGHT, columns * ring_tiles.tile_bytes(chosen.rows)):
        raise ValueError(f"{other} bytes in use leave no room for more than {in_flight} bytes of weights")
    return chosen
