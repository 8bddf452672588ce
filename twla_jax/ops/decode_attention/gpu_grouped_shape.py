"""Splits heads that share keys up between warps with tensor cores, and says where a thread is (Mosaic GPU)."""

import dataclasses

from twla_jax.ops.decode_attention.split_sizes import GroupConfig
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Word

CHUNK = 16  # positions that a warp reads at once: the rows of a product
SLOTS = 2  # of a warp, for steps whose copies are under way
PIECE = 16  # bytes that a thread reads at once, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupShape:
    """Describes features and heads, how they are split up, and whether entries are int8."""

    d: int
    heads: int
    kv_heads: int
    quantized: bool
    config: GroupConfig

    @property
    def size(self) -> int:
        """Return the bytes of a number of the cache."""
        return 1 if self.quantized else 2

    @property
    def slot(self) -> int:
        """Return the words of a slot: keys and values of a warp's step, and their scales if there are any."""
        return (2 * CHUNK * self.d * self.size + 2 * CHUNK * 4 * self.quantized) // 4

    @property
    def state(self) -> int:
        """Return the numbers of a thread's state: of two queries the largest scores, the sums, and mixes of values."""
        return 4 + 2 * self.d // 8


class MatrixLane:
    """Locates a thread in the matrices of its warp: row `row` of eight, and columns `2 · column` and the next."""

    def __init__(self, shape: GroupShape):
        self.shape, count = shape, shape.config.warps * threads.WARP
        self.group, self.thread = threads.thread() // count, threads.thread() & (count - 1)
        self.warp, self.lane = self.thread // threads.WARP, self.thread & (threads.WARP - 1)
        self.row, self.column = self.lane // 4, self.lane & 3

    def first(self, step: Word) -> Word:
        """Return the first position of the warp's in a step."""
        return (step * self.shape.config.warps + self.warp) * CHUNK

    def keys(self, step: Word) -> list[Word]:
        """Return the positions whose keys, and whose scales, a thread reads in a step."""
        first = self.first(step) + self.row
        return [first, first + 8]

    def values(self, step: Word) -> list[Word]:
        """Return the positions whose values a thread reads in a step."""
        first = self.first(step) + self.column * 2
        return [first + i for i in (0, 1, 8, 9)]

    def slot(self, ring: Word, slot: Word | int) -> Word:
        """Return where a slot of the warp's begins."""
        number = (threads.thread() // threads.WARP) * SLOTS + slot
        return ring + number * (4 * self.shape.slot)

    def key_feature(self, index: int) -> Word:
        """Return the first of the four features that a thread puts into product `index` of the scores."""
        of_piece = PIECE // self.shape.size // 4
        piece, within = divmod(index, of_piece)
        return self.column * (4 * of_piece) + (piece * 16 * of_piece + 4 * within)

    def value_feature(self, index: int) -> Word:
        """Return which feature the number `index` of a thread's values is."""
        of_piece = min(PIECE // self.shape.size, self.shape.d // 8)
        piece, within = divmod(index, of_piece)
        return self.row * of_piece + (piece * 8 * of_piece + within)

    def barrier(self) -> None:
        """Wait for the threads of the group."""
        threads.barrier(self.shape.config.warps * threads.WARP, self.group)


def line_of(row: Word, size: int) -> Word:
    """Return where the line of 128 bytes begins in which a row of `size` bytes begins."""
    return row * size & ~127


def swizzle(row: Word) -> Word:
    """Return what the offsets of a row's bytes in its line are xor-ed with.

    So no two lanes that are served at once read the same banks: eight read two rows that follow each other, or four
    rows that are two apart. It is linear: rows without a bit in common may be swizzled one after the other.
    """
    return ((row ^ row >> 1) & 1) * 64 + (row & 4) * 8


def constant_swizzle(row: int) -> int:
    """Return `swizzle` of a number that is known."""
    return ((row ^ row >> 1) & 1) * 64 + (row & 4) * 8
