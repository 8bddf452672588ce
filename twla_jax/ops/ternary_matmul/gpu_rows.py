"""Reads rows of two-bit codes as the left operands of `mma.sync`, thread by thread (Mosaic GPU)."""

import dataclasses

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.core.packing import PLANE
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.swizzle import swizzle_transforms
from twla_jax.ops.hopper.threads import Word
from twla_jax.ops.ternary_matmul.tile_configs import filled_up

WARPS = 4  # of a warpgroup
UNIT = 16  # rows of an `mma.sync`
PLANES = 4
SWIZZLED = swizzle_transforms(1)  # of codes, a byte each


@dataclasses.dataclass(frozen=True)
class Rows:
    """Describes a block's rows: `each` of one matrix, a multiple of 8, and as many of a second below if there are two.

    Units of 16 rows go to the warps of a warpgroup in turn; where there are but two, a unit's two warps share its
    columns.
    """

    each: int
    matrices: int

    @property
    def count(self) -> int:
        """Return the rows of all matrices."""
        return self.each * self.matrices

    @property
    def scales(self) -> int:
        """Return the rows of a matrix whose scales are copied: the copy engine writes to multiples of 128 bytes."""
        return filled_up(self.each)

    @property
    def units(self) -> int:
        """Return the number of units of 16 rows; the last one may have 8."""
        return -(-self.count // UNIT)

    @property
    def of_warp(self) -> int:
        """Return the units of a warp, at most."""
        return -(-self.units // WARPS)

    @property
    def shares(self) -> int:
        """Return the number of warps that share a unit."""
        return 2 if self.units <= 2 else 1


class RowLane:
    """Locates a thread in its warpgroup, and in the fragments of `mma.sync`."""

    def __init__(self, rows: Rows):
        self.rows = rows
        me = threads.thread()
        self.lane = me & (threads.WARP - 1)
        warp = (me // threads.WARP) & (WARPS - 1)
        self.unit, self.share = (warp & 1, warp // 2) if rows.shares > 1 else (warp, threads.word(0))
        self.group, self.pair = self.lane // 4, self.lane & 3

    def eight(self, i: int, half: Word | int) -> Word:
        """Return which eight rows of the block these are; of those past its last, the last ones."""
        return ((self.unit + WARPS * i) * 2 + half).least(self.rows.count // 8 - 1)

    def row(self, i: int, half: int) -> Word:
        """Return the row of the block whose sums this thread has; it may be past the last."""
        return (self.unit + WARPS * i) * UNIT + 8 * half + self.group

    def scale(self, i: int, half: int, tiles: int) -> Word:
        """Return where this row's first pair is in `[matrices, tiles, PLANES, scales]`."""
        row = self.eight(i, half) * 8 + self.group
        if self.rows.matrices == 1:
            return row
        before = threads.word(tiles * PLANES * self.rows.scales - self.rows.each)
        return row + threads.select(row >= self.rows.each, before, threads.word(0))

    def codes(self, at: Word, i: int) -> list[list[Word]]:
        """Return the bytes of a warp's unit i, in its share of a tile: left operands of 32 columns each.

        `at` is the address of the block's rows of a tile, as the copy engine leaves them `SWIZZLED`.
        """
        within = self.lane & 7
        first = at + self.eight(i, (self.lane // 8) & 1) * (8 * PLANE) + within * PLANE
        chunk = (within ^ (self.lane // 16)) << 4  # the copy engine swizzled chunks of 16 bytes
        shares = range(4 // self.rows.shares)
        return [threads.load_matrices(first + (chunk ^ ((self.share * 2 + j) << 5))) for j in shares]


def copy_tiles(
    weight: tuple, memory: tuple, barrier, first_tile, first_row, n: int, *, tiles: int, rows: Rows
) -> None:
    """Start the copies of codes, and of pairs unless None, for n rows of each matrix from `first_row` on.

    Into `[tiles, rows, PLANE]` bytes, and `[matrices, tiles, PLANES, rows.scales]`.
    """
    (codes_gmem, scales_gmem), (codes_smem, scales_smem) = weight, memory
    which = pl.ds(first_tile, tiles)
    for matrix in range(rows.matrices):
        first = matrix * n + first_row
        target = codes_smem.at[:, pl.ds(matrix * rows.each, rows.each)]
        plgpu.copy_gmem_to_smem(codes_gmem.at[which, pl.ds(first, rows.each)], target, barrier)
        if scales_smem is not None:
            source = scales_gmem.at[which, :, pl.ds(first, rows.scales)]
            plgpu.copy_gmem_to_smem(source, scales_smem.at[matrix], barrier)


def load_pair(
    me: RowLane, scales: ir.Value, tile: Word, i: int, half: int, plane: int, more: Word | int = 0
) -> Word:
    """Return (α, μ) of a row of a warp's unit i in a plane, or `more` planes on, of a tile that `copy_tiles` copied."""
    n, tiles = me.rows.scales, threads.shape(scales)[1]
    at = threads.address(scales) + (me.scale(i, half, tiles) + tile * (PLANES * n) + more * n) * 2
    return threads.load_short(at, offset=2 * n * plane)


def add_paired(product: Word, factor: Word | int, of_codes: Word, pair: Word, so_far: Word) -> Word:
    """Return `so_far + α · acc + μ · Q`, for a group's `acc = product · factor / 2¹⁶` and Q, which int16 holds.

    `of_codes` is Q's lower half, with zeros above it.
    """
    return threads.multiply_halves(product * factor + of_codes, pair, so_far)


def plane_of(packed: list[Word], plane: int) -> list[Word]:
    """Return a plane's codes where they lie in their bytes, `4 ** plane` times too large."""
    return [each & (0x03030303 << 2 * plane) for each in packed]
