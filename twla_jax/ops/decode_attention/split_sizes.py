"""Decides how a decode step's attention is split up, by rule from the shape."""

import dataclasses

from twla_jax.ops.hopper.limits import CLUSTERS, STREAMING_MULTIPROCESSORS

_LOADS = 8  # of keys, and of values, of 16 bytes each, that a thread has in flight
_MOST_LOADS = 10  # where these are all the loads of a thread
_QUERIES = 4  # of a warp, at most, which a thread has registers for
_WARPS, _FEW_WARPS = 16, 8  # of a block; a warp of several queries, or of a cluster, has registers for eight
_SPLITS = (4, 2)  # numbers of splits that are left apart; every reader of the mix reads them all
_MOST_READS = 20480  # of a key head's positions, by all of its queries; beyond, some read them together
_GROUP = 8  # queries of a block on tensor cores, at most: the columns of `mma.sync`
_FEWEST_GROUPS = 128  # on tensor cores, key heads of all sequences: the fewest that were measured unsplit
_FEWEST_ALONE = (
    512  # the same where no queries share one: 20.5 µs instead of 32.5 for int8, 35.5 and 39.4 for bf16
)
_POSITIONS = 64  # of a warp on tensor cores, at least: 16 sequences took 7.5 µs with 8 warps, 8.3 with 16
_OF_SPLIT = 32  # the same where several blocks share them: one sequence took 8.0 µs at 8192 instead of 23.2
_MOST_SPLITS = 32  # of a key head on tensor cores, which a thread has registers to merge
_SOME_STEPS, _MANY_STEPS = 2, 8  # of one block, beyond which clusters of four, and of other sizes, pay


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Describes a block: its queries, which share a key head; its warps, and the blocks, that share the positions.

    `loads` counts the loads of keys, and those of values, of 16 bytes each, that a thread has in flight. Blocks that
    share positions are a cluster, which combines their splits, or leave them `apart`.
    """

    queries: int
    warps: int
    splits: int
    loads: int = _LOADS
    apart: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Describes a block on tensor cores: its groups, their queries, which share a key head, and their warps.

    The warps of a group, and of as many blocks as there are `splits`, share the positions.
    """

    queries: int
    warps: int
    groups: int = 1
    splits: int = 1


def group_config(
    heads: int, shared: int, size: int, head_dim: int, *, quantized: bool = False
) -> GroupConfig | None:
    """Return the split for tensor cores, for arguments as `split_config` has them, or None if these do not pay.

    A multiprocessor has one block, of as many warps as there are registers for. A group has as many of them as keep
    the multiprocessors busy, and a block as many groups as let all blocks run at once. Key heads that are fewer than
    the multiprocessors are split: at 32768 positions one sequence of Qwen3-8B took 22.0 µs instead of 76.7 on an H200.
    """
    queries = max(n for n in range(1, _GROUP + 1) if shared % n == 0)
    blocks = heads // queries
    # Sixteen warps leave a thread 128 registers, and fill shared memory with copies under way.
    most = max(4, min(16, 16 * 128 // (head_dim * (1 if quantized else 2))))
    if queries == 1 and blocks < _FEWEST_ALONE:
        return None
    if blocks < _FEWEST_GROUPS:
        if shared * size <= _MOST_READS:  # then one sequence may do without this kernel, see `split_config`
            return None
        splits, warps = min(STREAMING_MULTIPROCESSORS // blocks, _MOST_SPLITS), most
        while warps > 4 and splits * warps * _OF_SPLIT > size:
            warps //= 2
        splits = max(min(splits, size // (warps * _OF_SPLIT)), 1)
        return GroupConfig(queries=queries, warps=warps, splits=splits)
    warps = most
    while warps > 4 and (warps * blocks > most * STREAMING_MULTIPROCESSORS or warps * _POSITIONS > size):
        warps //= 2
    rounds = -(-blocks // STREAMING_MULTIPROCESSORS)
    allowed = min(most // warps, 1 << (rounds - 1).bit_length())
    groups = next(n for n in (allowed, 2, 1) if n <= allowed and blocks % n == 0)
    return GroupConfig(queries=queries, warps=warps, groups=groups)


def split_config(
    heads: int, shared: int, size: int, head_dim: int, *, quantized: bool = False, apart: bool = False
) -> SplitConfig:
    """Return the split for `heads` of all sequences, `shared` of which have one key head, and a cache of `size`.

    Splits are left apart only where they may be, and where every block then has a multiprocessor of its own. Where
    there is a multiprocessor of an H100 for every head, and the cache is short, each query reads the keys that
    several share again, from the L2 cache. A thread has twice as many features of int8 entries, and registers for
    half as many.
    """
    choices = [n for n in range(1, _QUERIES + 1) if shared % n == 0]
    steps = _steps(size, _WARPS, head_dim)
    loads = _LOADS // 2 if quantized else _LOADS
    if apart and (shared == 1 or shared * size <= _MOST_READS):
        most = min(_steps(size, _FEW_WARPS, head_dim), STREAMING_MULTIPROCESSORS // heads)
        if splits := next((n for n in _SPLITS if n <= most), None):
            return SplitConfig(queries=1, warps=_FEW_WARPS, splits=splits, loads=loads, apart=True)
    queries, splits = _split(heads, choices, steps)
    warps = _FEW_WARPS if quantized or splits > 1 or heads > STREAMING_MULTIPROCESSORS else _WARPS
    return SplitConfig(queries=queries, warps=warps, splits=splits, loads=loads)


def all_at_once(config: SplitConfig, size: int, head_dim: int, *, quantized: bool) -> SplitConfig:
    """Return the same split with as many loads as bring all `size` positions at once, if the registers allow it."""
    features = 2 * 8 if quantized else 8
    needed = -(-size // (config.warps * config.splits * 32 * features // head_dim))
    most = _MOST_LOADS // 2 if quantized else _MOST_LOADS
    return dataclasses.replace(config, loads=needed) if needed <= most else config


def _steps(size: int, warps: int, head_dim: int) -> int:
    """Return the number of steps that a block takes for `size` positions."""
    return -(-size // (warps * _LOADS * 32 * 8 // head_dim))


def _split(heads: int, choices: list[int], steps: int) -> tuple[int, int]:
    """Return the queries of a block and the blocks of a cluster; clusters where they are faster and all fit at once."""
    many = steps > _MANY_STEPS
    if many or (steps > _SOME_STEPS and heads <= STREAMING_MULTIPROCESSORS):
        for splits in (4, 2) if many else (4,):
            for queries in choices:
                blocks = heads // queries
                if blocks <= CLUSTERS[splits] and (many or queries <= 2):
                    return queries, 8 if many and blocks <= CLUSTERS[8] else splits
    return next((n for n in choices if heads // n <= STREAMING_MULTIPROCESSORS), choices[-1]), 1
