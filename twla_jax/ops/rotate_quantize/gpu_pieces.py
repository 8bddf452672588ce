"""Assigns the pieces of matrices, 16 bytes each, to the threads that copy them into shared memory (Mosaic GPU)."""

import dataclasses

from jaxlib.mlir import ir

from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.swizzle import swizzle_bytes
from twla_jax.ops.hopper.threads import Word
from twla_jax.ops.rotate_quantize.gpu_rotation import TokenShape


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Describes a bf16 matrix that is copied, 16 bytes a thread at once, and what it is padded to.

    There are `before` others like it above it in shared memory.
    """

    rows: int
    columns: int
    whole_rows: int
    whole_columns: int
    before: int = 0

    def count(self, threads: int) -> int:
        """Return how many pieces each of so many threads copies, at most."""
        return -(-self.whole_rows * self.whole_columns // (8 * threads))

    def _chunk(self, i: int) -> tuple[Word, Word]:
        index = threads.thread() + i
        chunks = self.whole_columns // 8
        return index // chunks, index % chunks

    def exists(self, i: int) -> ir.Value:
        """Return whether the piece is within the padded matrix."""
        return threads.thread() + i < self.whole_rows * self.whole_columns // 8

    def real(self, i: int) -> ir.Value:
        """Return whether the piece is within the matrix, not padding."""
        row, chunk = self._chunk(i)
        return threads.both(row < self.rows, chunk < self.columns // 8)

    def offset(self, i: int) -> Word:
        """Return where the piece begins in global memory, in bytes."""
        row, chunk = self._chunk(i)
        return (row * self.columns + chunk * 8) * 2

    def place(self, i: int) -> Word:
        """Return where the swizzle puts the i-th piece of this thread."""
        width = swizzle_bytes(2, self.whole_columns)
        row, chunk = self._chunk(i)
        chunks = width // 16  # of a tile's row
        tile = (row // 8) * (self.whole_columns // 8 // chunks) + chunk // chunks
        swizzled = (chunk % chunks) ^ ((row // (128 // width)) % chunks)
        above = 2 * self.before * self.whole_rows * self.whole_columns
        return tile * (8 * width) + (row % 8) * width + swizzled * 16 + above


type Pieces = list[tuple[Matrix, int]]  # with the index of its first thread


def pieces_of_tokens(shape: TokenShape) -> list[Pieces]:
    """Return what a thread copies of each token."""
    matrices = (Matrix(shape.size, shape.r, shape.rows, shape.columns, i) for i in range(shape.tokens))
    return [_pieces(matrix, shape) for matrix in matrices]


def pieces_of_factors(shape: TokenShape) -> list[Pieces]:
    """Return what a thread copies of L and of Rᵀ."""
    left = Matrix(shape.rows, shape.rows, shape.rows, shape.rows)
    right = Matrix(shape.r, shape.r, shape.columns, shape.columns)
    return [_pieces(matrix, shape) for matrix in (left, right)]


def _pieces(matrix: Matrix, shape: TokenShape) -> Pieces:
    return [(matrix, i * shape.threads) for i in range(matrix.count(shape.threads))]
