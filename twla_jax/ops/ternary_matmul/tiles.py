"""Tile sizes of the packed matmuls: measured for some shapes, by rule for the rest."""

import dataclasses

from twla_jax.packing import PLANE

ROWS = 128  # matrices are filled up to a multiple of this

FEW_TOKENS = 32  # up to which int8 tokens are bound by the weights' way from memory
STREAMING_MULTIPROCESSORS = 132  # of an H100
MULTIPROCESSOR_MEMORY = 226 * 1024  # bytes that the blocks of a multiprocessor share
_FEW_ROWS, _MANY_ROWS = 6144, 32768  # up to and from where `few_tiles` are faster than `integer_tiles`
_ROWS_OF_MANY = 112  # of a block where there are many
_WARPGROUPS = 2  # that share its columns: with four, 4096×11008 took 7.2 µs instead of 6.9
_MOST_SLOTS = 32  # each has a barrier, of which Mosaic GPU takes no more at once
_SHARED_MEMORY = 220 * 1024  # bytes a block of an H100 may take, less what barriers need


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTiles:
    """Weight rows and tokens of a block, warpgroups that share its columns, and tiles each has under way.

    Tokens are a multiple of the 16 that `mma.sync` takes: a block unpacks its weights once for all of them.
    """

    rows: int
    tokens: int
    warpgroups: int
    stages: int


def gpu_tiles(tokens: int, rows: int, tiles: int, planes: int) -> GpuTiles:
    """Tiles for so many bf16 tokens and a matrix of `rows` by `128·planes·tiles`.

    Wide codes, of which the way from memory takes longest, are fastest in small blocks, several to a multiprocessor.
    """
    few, wide = 16, planes < 4
    if wide and tokens > few:
        few, block = (32 if tokens <= 32 else 64), 64
    else:
        block = 128
    while block > 32 and rows // block < STREAMING_MULTIPROCESSORS:
        block //= 2
    warpgroups = min(1 if wide else 2, tiles)
    # Codes, tokens, scales and sums of a slot; parts and output of a block.
    slot = block * 128 + planes * (few * 128 * 2 + 2 * block * 2) + max(2, planes) * few * 4
    left = _SHARED_MEMORY - (warpgroups + 1) * few * block * 4
    stages = min(2 if wide else 4, -(-tiles // warpgroups), left // (slot * warpgroups))
    return GpuTiles(rows=block, tokens=few, warpgroups=warpgroups, stages=stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerTiles:
    """Tokens of a block, warpgroups that share its columns, and tiles of 512 columns each has under way."""

    tokens: int
    warpgroups: int
    stages: int


def integer_tiles(tokens: int, rows: int, tiles: int) -> IntegerTiles:
    """Tiles for so many int8 tokens, few of them, and a matrix of `rows` by `512·tiles`.

    Two stages beat four on an H100, as more blocks then share a multiprocessor. Warpgroups are added until there is
    work for two to each, as far as their registers go.
    """
    block, most = next(pair for pair in ((8, 4), (16, 2), (FEW_TOKENS, 1)) if tokens <= pair[0])
    warpgroups = 1
    while 2 * warpgroups <= min(most, tiles) and rows // 64 * warpgroups < 2 * STREAMING_MULTIPROCESSORS:
        warpgroups *= 2
    return IntegerTiles(tokens=block, warpgroups=warpgroups, stages=min(2, -(-tiles // warpgroups)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewTiles:
    """Weight rows of a block, warpgroups that share its columns, and how many tiles of all of them have a slot."""

    rows: int
    warpgroups: int
    slots: int


# For up to so many tokens, by rows and tiles: what `benchmarks/tune.py --few` found faster than the rule.
TUNED_FEW = {
    (10240, 16): (8, FewTiles(rows=80, warpgroups=2, slots=7)),  # 11.1 µs instead of 12.8
    (8192, 16): (1, FewTiles(rows=64, warpgroups=2, slots=16)),  # 8.8 instead of 9.3
    (8192, 56): (1, FewTiles(rows=64, warpgroups=4, slots=10)),  # 24.3 instead of 24.6
    (22016, 8): (1, FewTiles(rows=168, warpgroups=4, slots=4)),  # 11.4 instead of 11.6
}


def few_tiles(tokens: int, rows: int, tiles: int) -> FewTiles:
    """Tiles for up to eight int8 tokens and a matrix of `rows` by `512·tiles`: those of `TUNED_FEW`, else by rule.

    By rule there are few rows or many. Few go to one block for each multiprocessor, with all its weights under way from
    the beginning. Many go to small blocks, two at a time to each. In between are `integer_tiles`.

    Raises:
      ValueError: the rows are in between, or the tokens leave no room for the weights.
    """
    most, tuned = TUNED_FEW.get((rows, tiles), (0, None))
    if tuned and tokens <= most:
        return tuned
    if _FEW_ROWS < rows < _MANY_ROWS:
        raise ValueError(f"{rows} rows are neither few nor many")
    few = rows <= _FEW_ROWS
    resident, groups = 1 if few else 2, min(_WARPGROUPS, tiles)
    waves = 1 if few else -(-rows // (_ROWS_OF_MANY * STREAMING_MULTIPROCESSORS))
    each = max(8 * -(-rows // (8 * waves * STREAMING_MULTIPROCESSORS)), 32)
    parts = 4 * groups * (2 if each <= 32 else 1) * tokens * each
    other = max(parts, tokens * token_bytes(tiles)) + 128 * tiles + 4096
    slots = min((MULTIPROCESSOR_MEMORY // resident - other) // tile_bytes(each), tiles, _MOST_SLOTS)
    if slots < (tiles if few else groups):
        raise ValueError(f"{tokens} tokens of {tiles} tiles leave no room for weights")
    return FewTiles(rows=each, warpgroups=groups, slots=slots)


def filled_up(rows: int) -> int:
    """So many rows' pairs of scales for every plane are a multiple of the 128 bytes that the copy engine writes to."""
    return -(-rows // 16) * 16


def tile_bytes(rows: int) -> int:
    """Of codes and pairs of scales."""
    return PLANE * rows + 8 * filled_up(rows)


def token_bytes(tiles: int) -> int:
    """Between one token's codes and the next one's: such that eight of them lie in different banks."""
    return 512 * tiles + 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """Tokens and weight rows of a block."""

    tokens: int
    rows: int


def tpu_tiles(tokens: int, rows: int) -> TpuTiles:
    """Tiles for so many tokens and weight rows, a multiple of 128."""
    block = next(size for size in (512, 384, 256, 128) if rows % size == 0)
    return TpuTiles(tokens=min(256, -(-tokens // 32) * 32), rows=block)
