"""How a decode step's attention is split up, by rule from the shape."""

import dataclasses

from twla_jax.ops.ternary_matmul.tile_configs import STREAMING_MULTIPROCESSORS

_LOADS = 8  # of keys and of values, of 16 bytes each, that a thread has under way
_MOST_LOADS = 10  # where these are all that there are
_QUERIES = 4  # of a warp, at most: what a thread has registers for
_WARPS, _FEW_WARPS = 16, 8  # of a block; a warp of several queries, or of a cluster, has registers for eight
# Blocks of a cluster, and clusters that an H100 has room for at once, a block to each multiprocessor: not all of its
# groups of multiprocessors are divided by four.
_CLUSTERS = {2: 66, 4: 30, 8: 15}
_PARTS = (4, 2)  # blocks that leave their parts apart: each is to be read by all who read the mix
_MOST_READS = 20480  # of a key head's positions, by all of its queries; beyond, some read them together
_SOME_STEPS, _MANY_STEPS = 2, 8  # of a block alone, beyond which clusters of four, and others, are worth it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Queries of a block, which share a key head; its warps, which share the positions; and blocks that do so, too.

    `loads` are those of keys, and of values, of 16 bytes each, that a thread has under way. Blocks that share positions
    are a cluster, in which their parts meet, or leave them `apart`.
    """

    queries: int
    warps: int
    splits: int
    loads: int = _LOADS
    apart: bool = False


def tiles(
    heads: int, shared: int, size: int, head_dim: int, *, quantized: bool = False, apart: bool = False
) -> Tiles:
    """Tiles for `heads` of all sequences, of which `shared` have a key head, and a cache with room for `size`.

    Parts are left apart only where they may be, and where that gives every block a multiprocessor of its own. Where
    there is a multiprocessor of an H100 for every head, and the cache is short, it reads keys that several share anew,
    from the L2 cache. A thread has twice as many features of int8 entries, and registers for half as many.
    """
    choices = [n for n in range(1, _QUERIES + 1) if shared % n == 0]
    steps = _steps(size, _WARPS, head_dim)
    loads = _LOADS // 2 if quantized else _LOADS
    if apart and (shared == 1 or shared * size <= _MOST_READS):
        most = min(_steps(size, _FEW_WARPS, head_dim), STREAMING_MULTIPROCESSORS // heads)
        if splits := next((n for n in _PARTS if n <= most), None):
            return Tiles(queries=1, warps=_FEW_WARPS, splits=splits, loads=loads, apart=True)
    queries, splits = _split(heads, choices, steps)
    warps = _FEW_WARPS if quantized or splits > 1 or heads > STREAMING_MULTIPROCESSORS else _WARPS
    return Tiles(queries=queries, warps=warps, splits=splits, loads=loads)


def all_at_once(tiles: Tiles, size: int, head_dim: int, *, quantized: bool) -> Tiles:
    """The same with as many loads as bring all `size` positions at once, if a thread has registers for them."""
    features = 2 * 8 if quantized else 8
    needed = -(-size // (tiles.warps * tiles.splits * 32 * features // head_dim))
    most = _MOST_LOADS // 2 if quantized else _MOST_LOADS
    return dataclasses.replace(tiles, loads=needed) if needed <= most else tiles


def _steps(size: int, warps: int, head_dim: int) -> int:
    """That a block takes for so many positions."""
    return -(-size // (warps * _LOADS * 32 * 8 // head_dim))


def _split(heads: int, choices: list[int], steps: int) -> tuple[int, int]:
    """Queries of a block and blocks of a cluster; clusters where they are faster and all are there at once."""
    many = steps > _MANY_STEPS
    if many or (steps > _SOME_STEPS and heads <= STREAMING_MULTIPROCESSORS):
        for splits in (4, 2) if many else (4,):
            for queries in choices:
                blocks = heads // queries
                if blocks <= _CLUSTERS[splits] and (many or queries <= 2):
                    return queries, 8 if many and blocks <= _CLUSTERS[8] else splits
    return next((n for n in choices if heads // n <= STREAMING_MULTIPROCESSORS), choices[-1]), 1
