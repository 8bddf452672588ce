"""Describes where tokens' codes and sums lie: in columns of `mma.sync`, and in shared memory (Mosaic GPU)."""

import dataclasses

from jaxlib.mlir import ir

from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Word
from twla_jax.ops.ternary_matmul.gpu_rows import PLANES, RowLane

COLUMNS = 8  # of `mma.sync`
PER_THREAD = 2  # columns of a product that a thread has, neighbours; of two rows
HALVES = 2  # of a unit's rows, of which a thread has one each


@dataclasses.dataclass(frozen=True)
class Columns:
    """Assigns a product's columns: `width · p + i` has token i of its round, and plane p of those it has at once."""

    tokens: int

    @property
    def rounds(self) -> int:
        """Return the number of rounds of products, each with up to eight tokens."""
        return -(-self.tokens // COLUMNS)

    @property
    def width(self) -> int:
        """Return the tokens of a round, padded to a power of two."""
        return min(max(1 << (self.tokens - 1).bit_length(), PER_THREAD), COLUMNS)

    @property
    def filled(self) -> int:
        """Return the tokens of all rounds."""
        return self.rounds * self.width

    @property
    def at_once(self) -> int:
        """Return the planes of a product."""
        return COLUMNS // self.width

    @property
    def products(self) -> int:
        """Return the products of a round."""
        return PLANES // self.at_once

    @property
    def used(self) -> int:
        """Return the columns of a thread that hold a distinct token."""
        return min(self.tokens, PER_THREAD)

    @property
    def numbers(self) -> int:
        """Return the columns of all products."""
        return self.rounds * self.products * COLUMNS

    @property
    def of_unit(self) -> int:
        """Return the sums of a thread for a unit."""
        return self.rounds * HALVES * self.used

    def place(self, i: int, round_index: int, half: int, other: int) -> int:
        """Return where a thread has the sum of its unit i's half, and of a round's column."""
        return i * self.of_unit + (round_index * HALVES + half) * self.used + other

    def number(self, token: int) -> int:
        """Return which of all `numbers` a token's first column is."""
        return token // COLUMNS * (self.products * COLUMNS) + token % COLUMNS

    def first_token(self, me: RowLane) -> Word:
        """Return the token of a thread's first column in the first round."""
        return (me.pair * PER_THREAD) % self.width

    def plane(self, me: RowLane) -> Word:
        """Return which of a product's planes a thread's columns have."""
        return (me.pair * PER_THREAD) // self.width

    def shift(self, me: RowLane) -> Word:
        """Return by how many bits a thread's sums of the first product are too large."""
        return self.plane(me) * 2

    def more(self, product: int) -> int:
        """Return the extra shift, in bits, of product `product`."""
        return 2 * product * self.at_once


@dataclasses.dataclass(frozen=True)
class Flat:
    """Lays tokens' codes out in shared memory: 16 bytes are left free after every `run`, against bank conflicts.

    Of 64 codes, words (four codes) 0, 4, 8 and 12 come first, then 1, 5, 9 and 13, and so on: what a thread multiplies
    lies together.
    """

    r: int

    @property
    def run(self) -> int:
        """Return the number of codes that lie next to each other."""
        return 128 if self.r % 128 == 0 else 64

    @property
    def regular(self) -> bool:
        """Return whether rows of r codes begin at equal distances."""
        return self.r % self.run == 0

    def offset(self, row: int, column: int) -> int:
        """Return the bytes from a code to that `row` rows and 0 or 8 columns on, if rows are regular."""
        return row * self.size(self.r) + column * 4

    def size(self, count: int) -> int:
        """Return the bytes of `count` codes, whole runs, and what is left free."""
        return count + 16 * (count // self.run)

    def stride(self, count: int) -> int:
        """Return the bytes from a token of `count` codes to the next: two are read at once, 64 bytes each."""
        size = self.size(count)
        return size + (64 - size) % 128

    def token(self, codes: ir.Value, index: int) -> Word:
        """Return the address of a token in `[tokens, stride]`."""
        return threads.address(codes) + index * threads.shape(codes)[1]

    def place(self, index: Word) -> Word:
        """Return where a code's byte is."""
        word = index // 4
        return self.chunk(index // 64 * 64) + (word & 3) * 16 + ((word // 4) & 3) * 4 + (index & 3)

    def chunk(self, first: Word) -> Word:
        """Return where the 16 bytes begin that are `first` bytes after the first one, counting what is left free."""
        return first + (first // self.run) * 16
