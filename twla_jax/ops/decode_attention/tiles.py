"""How a decode step's attention is split up, by rule from the shape."""

import dataclasses

from twla_jax.ops.ternary_matmul.tiles import STREAMING_MULTIPROCESSORS

KEYS = 64  # of a tile
_CLUSTER = 8  # blocks of a cluster, at most
_RING = 128 * 1024  # bytes of a block's keys and values under way, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Blocks that share a key head's positions, warpgroups of each, and tiles that a warpgroup has under way."""

    splits: int
    warpgroups: int
    stages: int


def tiles(heads: int, size: int, head_dim: int) -> Tiles:
    """Tiles for so many key heads, of all sequences together, and a cache with room for `size` positions.

    Blocks are added up to half the multiprocessors of an H100: with more, the clusters of a head no longer all find
    room at once, and the kernel takes twice as long. Then a second warpgroup where a block has work for it.
    """
    most = -(-size // KEYS)
    splits = 1
    while 2 * splits <= min(_CLUSTER, most) and 2 * splits * heads <= STREAMING_MULTIPROCESSORS // 2:
        splits *= 2
    slot = 2 * KEYS * head_dim * 2
    few_blocks = splits * heads <= STREAMING_MULTIPROCESSORS // 2
    warpgroups = 2 if few_blocks and most >= 4 * splits and 2 * slot <= _RING else 1
    stages = min(2, -(-most // (splits * warpgroups)), _RING // (slot * warpgroups))
    return Tiles(splits=splits, warpgroups=warpgroups, stages=stages)
