"""How a decode step's attention is split up, by rule from the shape."""

import dataclasses

from twla_jax.ops.ternary_matmul.tiles import STREAMING_MULTIPROCESSORS

LOADS = 8  # of keys and of values, of 16 bytes each, that a thread has under way
_QUERIES = 4  # of a warp, at most: what a thread has registers for
_CLUSTER = 8  # blocks of a cluster, at most
_STEPS = 4  # of a warp, from which on another block is worth what it costs to start a cluster


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Queries of a block, which share a key head; its warps, which share the positions; and blocks that do so, too."""

    queries: int
    warps: int
    splits: int


def tiles(heads: int, shared: int, size: int, head_dim: int) -> Tiles:
    """Tiles for `heads` of all sequences, of which `shared` have a key head, and a cache with room for `size`.

    Where there is a multiprocessor of an H100 for every head, it reads keys that several share anew, from the L2 cache.
    """
    if heads <= STREAMING_MULTIPROCESSORS:
        queries, warps = 1, 16
    else:
        queries, warps = max(n for n in range(1, _QUERIES + 1) if shared % n == 0), 8
    splits, blocks = 1, heads // queries
    positions = warps * LOADS * 32 * 8 // head_dim  # that a block reads at once
    while (
        2 * splits <= _CLUSTER
        and 2 * splits * blocks <= STREAMING_MULTIPROCESSORS
        and size > _STEPS * splits * positions
    ):
        splits *= 2
    return Tiles(queries=queries, warps=warps, splits=splits)
