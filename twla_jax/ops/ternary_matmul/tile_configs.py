"""Tile sizes of the packed matmuls: measured for some shapes, by rule for the rest."""

import dataclasses

from twla_jax.core.packing import PLANE

ROWS = 128  # matrices are filled up to a multiple of this

FEW_TOKENS = 16  # up to which int8 tokens are bound by the weights' way from memory
_MANY_TOKENS = 128  # up to which they are one block
_X_BYTES = 128 * 1024  # of those that are under way
STREAMING_MULTIPROCESSORS = 132  # of an H100
MULTIPROCESSOR_MEMORY = 226 * 1024  # bytes that the blocks of a multiprocessor share
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
    block, most = next(pair for pair in ((8, 4), (FEW_TOKENS, 2)) if tokens <= pair[0])
    warpgroups = 1
    while 2 * warpgroups <= min(most, tiles) and rows // 64 * warpgroups < 2 * STREAMING_MULTIPROCESSORS:
        warpgroups *= 2
    return IntegerTiles(tokens=block, warpgroups=warpgroups, stages=min(2, -(-tiles // warpgroups)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyTiles:
    """Tokens of a block, a multiple of 32, and how its two warpgroups share the work.

    Of one line, each has 64 rows of its own; of two, both have the same, and share the columns. Blocks of a `cluster`
    share tokens. A line has `stages` tiles of weights under way, and `x_slots` times `x_planes` of a tile's planes of
    tokens.
    """

    tokens: int
    lines: int
    cluster: int
    stages: int
    x_slots: int
    x_planes: int


def many_tiles(tokens: int, rows: int) -> ManyTiles:
    """Tiles for so many int8 tokens.

    Of two lines, blocks have half as many rows: that is faster where the last multiprocessor is then done earlier, but
    for many tokens only where there is no more than one block for each.
    """

    def rounds(block_rows: int, block_tokens: int) -> int:
        return -(-(-(-rows // block_rows) * -(-tokens // block_tokens)) // STREAMING_MULTIPROCESSORS)

    if tokens > _MANY_TOKENS:
        few = rounds(64, _MANY_TOKENS) == 1
        block, lines = (_MANY_TOKENS, 2) if few else (2 * _MANY_TOKENS, 1)
    else:
        block = -(-tokens // 32) * 32
        lines = 2 if rounds(64, block) < 2 * rounds(128, block) else 1
    x_planes = 4 if block <= 64 else 2 if block <= _MANY_TOKENS else 1
    return ManyTiles(
        tokens=block,
        lines=lines,
        cluster=2 if lines == 1 and block > 64 else 1,
        stages=3 if block <= 64 else 2,
        x_slots=min(4, _X_BYTES // (lines * block * PLANE * x_planes)),
        x_planes=x_planes,
    )


def filled_up(rows: int) -> int:
    """So many rows' pairs of scales for every plane are a multiple of the 128 bytes that the copy engine writes to."""
    return -(-rows // 16) * 16


def tile_bytes(rows: int) -> int:
    """Of codes and pairs of scales."""
    return PLANE * rows + 8 * filled_up(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """Tokens and weight rows of a block."""

    tokens: int
    rows: int


def tpu_tiles(tokens: int, rows: int) -> TpuTiles:
    """Tiles for so many tokens and weight rows, a multiple of 128."""
    block = next(size for size in (512, 384, 256, 128) if rows % size == 0)
    return TpuTiles(tokens=min(256, -(-tokens // 32) * 32), rows=block)
