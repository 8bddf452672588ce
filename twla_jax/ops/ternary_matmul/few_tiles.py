"""Tile sizes of few tokens' products: measured for some shapes, by rule for the rest."""

from twla_jax.ops.ternary_matmul import ring_tiles
from twla_jax.ops.ternary_matmul.ring_tiles import WARPGROUPS, Tiles

# Bytes of weights that a block asks for ahead. With 96 KB one token at 10240×8192 took 10.5 µs instead of 10.0.
_UNDER_WAY = 66 * 1024
# Less is slower than `gpu_integer`: with 30 KB sixteen tokens at 57344×8192 took 62.9 µs instead of 54.5.
_LEAST_UNDER_WAY = 40 * 1024
# By rows, columns of 512, and tokens filled up, one to two: what `benchmarks/tune.py --few` found faster than the rule.
TUNED = {
    (22016, 8, 2): Tiles(rows=56, warpgroups=2, stages=3),  # 10.5 µs instead of 10.7
    (22016, 8, 4): Tiles(rows=56, warpgroups=2, stages=3),  # 10.8 instead of 11.3
    (22016, 8, 8): Tiles(rows=56, warpgroups=2, stages=3),  # 11.3 instead of 11.6
    (4096, 22, 8): Tiles(rows=32, warpgroups=3, stages=4),  # 7.5 instead of 8.1
}


def tiles(rows: int, columns: int, tokens: int, other: int) -> Tiles:
    """Tiles for so many rows by `512·columns`, and tokens, filled up as `gpu_products.Columns` does.

    Beside `other` bytes of shared memory: see `ring_tiles.tiles`.

    Raises:
      ValueError: there is too little room.
    """
    if tuned := TUNED.get((rows, columns, tokens)):
        return tuned
    of_row = 4 * WARPGROUPS * tokens  # of sums
    chosen = ring_tiles.tiles(rows, 1, columns, 1, other, of_row=of_row, under_way=_UNDER_WAY)
    under_way = ring_tiles.under_way(chosen, 1)
    if under_way < min(_LEAST_UNDER_WAY, columns * ring_tiles.tile_bytes(chosen.rows)):
        raise ValueError(f"{other} bytes leave no room for more than {under_way} of weights")
    return chosen
