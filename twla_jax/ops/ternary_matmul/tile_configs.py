"""Chooses the tile sizes of the packed matmuls: measured for some shapes, by rule for the rest."""

import dataclasses

from twla_jax.core.packing import PLANE
from twla_jax.ops.hopper.limits import BLOCK_MEMORY, CLUSTERS, STREAMING_MULTIPROCESSORS, WGMMA_ROWS

ROW_PADDING = 128  # matrices are padded to a multiple of this

FEW_TOKENS = 16  # up to which int8 products are limited by loading the weights
_MANY_TOKENS = 128  # up to which they are one block
_X_BYTES = 128 * 1024  # of tokens in flight


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTileConfig:
    """Describes a block's rows and tokens, the warpgroups that share its columns, and each one's tiles in flight.

    Tokens are a multiple of the 16 that `mma.sync` takes: a block unpacks its weights once for all of them.
    """

    rows: int
    tokens: int
    warpgroups: int
    stages: int


def gpu_tile_config(tokens: int, rows: int, tiles: int, planes: int) -> GpuTileConfig:
    """Return the config for `tokens` bf16 tokens and a matrix of `rows` by `128·planes·tiles`.

    Wide codes, which take longest to load, are fastest in small blocks, several to a multiprocessor.
    """
    few, wide = 16, planes < 4
    if wide and tokens > few:
        few, block = (32 if tokens <= 32 else 64), 64
    else:
        block = 128
    while block > 32 and rows // block < STREAMING_MULTIPROCESSORS:
        block //= 2
    warpgroups = min(1 if wide else 2, tiles)
    # A slot has codes, tokens, scales and sums; a block has partial sums and an output.
    slot = block * 128 + planes * (few * 128 * 2 + 2 * block * 2) + max(2, planes) * few * 4
    left = BLOCK_MEMORY - (warpgroups + 1) * few * block * 4
    stages = min(2 if wide else 4, -(-tiles // warpgroups), left // (slot * warpgroups))
    return GpuTileConfig(rows=block, tokens=few, warpgroups=warpgroups, stages=stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmaTileConfig:
    """Describes a block's tokens, the warpgroups that share its columns, and each one's column tiles in flight."""

    tokens: int
    warpgroups: int
    stages: int


def mma_tile_config(tokens: int, rows: int, tiles: int) -> MmaTileConfig:
    """Return the config for `tokens` int8 tokens, few of them, and a matrix of `rows` by `512·tiles`.

    Two stages beat four on an H100, as more blocks then share a multiprocessor. Warpgroups are added until there is
    work for two to each, as far as their registers go.
    """
    block, most = next(pair for pair in ((8, 4), (FEW_TOKENS, 2)) if tokens <= pair[0])
    warpgroups = 1
    while (
        2 * warpgroups <= min(most, tiles) and rows // WGMMA_ROWS * warpgroups < 2 * STREAMING_MULTIPROCESSORS
    ):
        warpgroups *= 2
    return MmaTileConfig(tokens=block, warpgroups=warpgroups, stages=min(2, -(-tiles // warpgroups)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyTileConfig:
    """Describes a block's tokens, 16 or a multiple of 32, and how its two warpgroups share the work.

    With one line, each has 64 rows of its own; with two, both have the same rows, and share the columns. Blocks of a
    `cluster` share tokens; or, where `split`, the two blocks have the same rows and tokens, and share the columns, with
    two lines each. A line has `stages` tiles of weights in flight, and `x_slots` times `x_planes` of a tile's planes of
    tokens.
    """

    tokens: int
    lines: int
    cluster: int
    stages: int
    x_slots: int
    x_planes: int
    split: bool = False


def many_tile_config(tokens: int, rows: int, itemsize: int = 2) -> ManyTileConfig:
    """Return the config for `tokens` int8 tokens, and outputs of `itemsize` bytes.

    With two lines, blocks have half as many rows: that is faster where the last multiprocessor is then done earlier,
    but for many tokens only where there is no more than one block for each. Where clusters of two then still run at
    once, they share the columns, if there is memory: on an H200, 4096×12288 by 64 tokens took 11.7 µs instead of 15.7,
    4096×11008 by 32 9.4 instead of 12.7.
    """

    def rounds(block_rows: int, block_tokens: int) -> int:
        return -(-(-(-rows // block_rows) * -(-tokens // block_tokens)) // STREAMING_MULTIPROCESSORS)

    if tokens > _MANY_TOKENS:
        few = rounds(64, _MANY_TOKENS) == 1
        block, lines = (_MANY_TOKENS, 2) if few else (2 * _MANY_TOKENS, 1)
    else:
        block = FEW_TOKENS if tokens <= FEW_TOKENS else -(-tokens // 32) * 32
        lines = 2 if rounds(64, block) < 2 * rounds(128, block) else 1
    split = lines == 2 and block <= 64 and itemsize == 2 and -(-rows // WGMMA_ROWS) <= CLUSTERS[2]
    x_planes = 4 if block <= 64 else 2 if block <= _MANY_TOKENS else 1
    return ManyTileConfig(
        tokens=block,
        lines=lines,
        cluster=2 if split or (lines == 1 and block > 64) else 1,
        stages=3 if block <= 64 else 2,
        x_slots=min(2 if split else 4, _X_BYTES // (lines * block * PLANE * x_planes)),
        x_planes=x_planes,
        split=split,
    )


def filled_up(rows: int) -> int:
    """Return `rows` padded so that their pairs of a tile are a multiple of 128 bytes, as the copy engine writes."""
    return -(-rows // 16) * 16


def tile_bytes(rows: int) -> int:
    """Return the bytes of codes and pairs of scales of a tile."""
    return PLANE * rows + 8 * filled_up(rows)


TPU_FEW_TOKENS = 256  # up to which scaling sums takes fewer operations than scaling weights
TPU_MEMORY = 60 * 1024 * 1024  # of VMEM, of which v7x has the least: 64 MiB
_TPU_LEAST_MEMORY = 16 * 1024 * 1024
_TPU_LARGE_BLOCK = 1024  # rows
_TPU_EXPERT_BYTES = 1024 * 1024  # of a block's codes
_TPU_BLOCK_BYTES = 16 * 1024 * 1024  # of a block of tokens, which is there twice, and of unpacked weights
_TPU_SINGLE_BYTES = 24 * 1024 * 1024  # of the only block of tokens, which is there once
_TPU_MOST_TOKENS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTileConfig:
    """Describes the tokens and weight rows of a block."""

    tokens: int
    rows: int


def tpu_tile_config(tokens: int, rows: int, columns: int, itemsize: int, *, many: bool) -> TpuTileConfig:
    """Return the config for `tokens` tokens and `rows` weight rows, a multiple of 128.

    Args:
      tokens: of all blocks.
      rows: of the weight.
      columns: of both, filled up to whole tiles.
      itemsize: bytes of a token's number.
      many: weights are unpacked for each block of tokens, which is as large as there is memory.
    """
    blocks = [size for size in (512, 384, 256, 128) if rows % size == 0]
    if not many:
        each = -(-tokens // -(-tokens // 128))
        filled = -(-each // 8) * 8 if each == tokens else -(-each // 32) * 32
        # The larger a block, the fewer steps begin and end, but nothing hides the loading of the first one.
        large = rows % _TPU_LARGE_BLOCK == 0 and rows >= 8 * _TPU_LARGE_BLOCK and filled <= 32
        return TpuTileConfig(tokens=filled, rows=_TPU_LARGE_BLOCK if large else blocks[0])
    # Weights are unpacked to int8, or to bf16 where a chip has no products of int8.
    fitting = [size for size in blocks if 2 * size * columns <= _TPU_BLOCK_BYTES]
    of_all = -(-tokens // 128) * 128
    if of_all <= _TPU_MOST_TOKENS and of_all * columns * itemsize <= _TPU_SINGLE_BYTES:
        most = of_all
    else:
        most = max(256, min(_TPU_MOST_TOKENS, _TPU_BLOCK_BYTES // (columns * itemsize) // 256 * 256))
    each = -(-tokens // -(-tokens // most))
    filled = -(-each // 128) * 128 if each > 256 else -(-each // 32) * 32
    return TpuTileConfig(tokens=filled, rows=(fitting or blocks[-1:])[0])


def tpu_expert_rows(rows: int, tiles: int) -> int:
    """Return the weight rows of a block of an expert: large, as its loading hides behind the expert before.

    Args:
      rows: of the weight, a multiple of 128.
      tiles: of its columns.
    """
    sizes = [size for size in (2048, 1024, 512, 384, 256, 128) if rows % size == 0]
    return next((size for size in sizes if size * tiles * PLANE <= _TPU_EXPERT_BYTES), sizes[-1])


def tpu_memory(config: TpuTileConfig, columns: int, itemsize: int, bits: int, *, many: bool) -> int:
    """Return the bytes of VMEM that a kernel may use, hardly more than it needs: XLA keeps arrays in the rest.

    Args:
      config: from `tpu_tile_config`.
      columns: of both operands.
      itemsize: bytes of a token's number.
      bits: of a code.
      many: as in `tpu_tile_config`.
    """
    tokens, rows = config.tokens, config.rows
    blocks = (
        tokens * columns * itemsize + 4 * tokens * rows + rows * columns * bits // 8 + rows * columns // 16
    )
    chunk = min(tokens, 512)
    unpacked = 2 * rows * columns + 2 * chunk * columns + 4 * chunk * rows if many else 0
    return min(max(5 * (2 * blocks + unpacked) // 4, _TPU_LEAST_MEMORY), TPU_MEMORY)
