"""Tokens' norm, rotation and codes on all threads of a block (Pallas Mosaic GPU), as fast as one can wait for them.

The rotation is two products on the tensor cores: `Yᵀ = Rᵀ Xᵀ`, of which a warpgroup has 64 rows, and from its
registers on `Zᵀ = Yᵀ Lᵀ`, of which warpgroups with the same rows take different columns. Whatever is waited for, all
tokens wait for together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.decode_attention.parts import LEAST_SUM, AttentionParts
from twla_jax.ops.gpu_threads import Real, Word
from twla_jax.ops.rotate_quantize.gpu import swizzled
from twla_jax.ops.rotate_quantize.rotation import KernelRotation

WGMMA_ROWS = 64
# Of a thread's products under way. With 96 and more two tokens at 4096×11008 took 11.2 µs instead of 10.95.
_SUMS = 95
# Of `Zᵀ`s, that a thread has registers for. A step of LLaMA-2-7B with 192 (down at four tokens) took 2321 µs, and with
# two ops there 2181; with 144 (three tokens) 1856 instead of 1971.
_NUMBERS = 160
_WARPGROUPS = 2  # that leave a thread so many registers


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens as `size × r` matrices, each filled up to `rows × columns`, on so many warpgroups."""

    size: int
    r: int
    rows: int
    warpgroups: int
    tokens: int
    parts: int = 0  # of an attention, that tokens are to be merged of; 0 for tokens as they are
    heads: int = 0

    @property
    def columns(self) -> int:
        """Of the filled up matrix."""
        return -(-self.r // WGMMA_ROWS) * WGMMA_ROWS

    @property
    def threads(self) -> int:
        """Of all warpgroups."""
        return 128 * self.warpgroups

    @property
    def warps(self) -> int:
        """Of all warpgroups."""
        return self.threads // threads.WARP

    @property
    def lines(self) -> int:
        """Into how many of 64 rows `Yᵀ` is cut."""
        return self.columns // WGMMA_ROWS

    @property
    def shares(self) -> int:
        """Into how many columns of `Zᵀ` are cut; warpgroups that are left do what another does, too."""
        most = self.warpgroups // self.lines
        return next(n for n in range(most, 0, -1) if self.rows % (8 * n) == 0)

    @property
    def numbers(self) -> int:
        """Of all tokens' `Zᵀ`, that a thread has."""
        return self.tokens * self.rows // self.shares // 2


def shape(x: jax.Array | AttentionParts, rotation: KernelRotation, warpgroups: int) -> Shape:
    """How a rotation's tokens are shared between warpgroups."""
    parts = heads = 0
    if isinstance(x, AttentionParts):
        x, (_, parts, heads, _) = x.mixed, x.softmax.shape
    return Shape(
        size=rotation.size,
        r=len(rotation.right_transposed),
        rows=len(rotation.left),
        warpgroups=warpgroups,
        tokens=len(x),
        parts=parts,
        heads=heads,
    )


def obstacle(shape: Shape) -> str | None:
    """Why tokens of such a shape cannot be turned, or None."""
    if shape.r % 8:
        return f"the right factor has {shape.r} rows, not a multiple of 8"
    if shape.lines > shape.warpgroups:
        return f"the right factor has {shape.r} rows, more than {WGMMA_ROWS * shape.warpgroups}"
    # A thread's share of Yᵀ and Zᵀ, in registers.
    if shape.rows > 128:
        return f"the left factor has {shape.size} rows, more than 128"
    if shape.tokens > 1 and (shape.numbers > _NUMBERS or shape.warpgroups > _WARPGROUPS):
        return f"{shape.tokens} tokens of {shape.size}×{shape.r} are more than there are registers for"
    return None


def token_memory(shape: Shape, dtype):
    """Shared memory of the tokens, one below the other."""
    return plgpu.SMEM((shape.tokens * shape.rows, shape.columns), dtype, transforms=swizzled(shape.columns))


def left_memory(shape: Shape, dtype):
    """Shared memory of L."""
    return plgpu.SMEM((shape.rows, shape.rows), dtype, transforms=swizzled(shape.rows))


def right_memory(shape: Shape, dtype):
    """Shared memory of Rᵀ."""
    return plgpu.SMEM((shape.columns, shape.columns), dtype, transforms=swizzled(shape.columns))


def warps_memory(shape: Shape):
    """Shared memory of what warps tell each other: two numbers each of a token."""
    return plgpu.SMEM((2 * shape.warps * shape.tokens,), jnp.float32)


def fetch(
    x_gmem, left_gmem, right_gmem, norm_gmem, settings_gmem, *, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Starts the way of the tokens, both factors and the norm's weights to the threads, for `load`; and the settings.

    Not by the copy engine, which would bring them in turn with the weights. `x_gmem` lists the tokens or, of attention
    left in parts, mixes and softmaxes.
    """
    refs = [settings_gmem, left_gmem, right_gmem, *x_gmem, *([] if norm_gmem is None else [norm_gmem])]
    *tokens, left, right = _pieces(shape)
    wide = 0 if norm_gmem is None else norm_gmem.dtype.itemsize // 2
    count = sum(len(pieces) for pieces in tokens) * _words(shape)
    count += 4 * (len(left) + len(right) + wide * len(tokens[0]))

    @threads.on_threads(
        arg_types=(plgpu.RefType(),) * len(refs),
        return_type=(threads.values(count, jnp.int32), threads.values(3, jnp.float32)),
    )
    def start(_, settings, left_ref, right_ref, x, *more):
        found = []
        for token, pieces in enumerate(tokens):
            for matrix, i in pieces:
                found += _fetch_piece(x, more[0] if shape.parts else None, token, matrix, i, shape)
        for ref, pieces, width in (
            (left_ref, left, 1),
            (right_ref, right, 1),
            *([(more[-1], tokens[0], wide)] if wide else []),
        ):
            found += [
                word
                for matrix, i in pieces
                for part in range(width)
                for word in threads.load_global(
                    ref, matrix.offset(i) * width + 16 * part, 4, condition=matrix.real(i)
                )
            ]
        values = [threads.load_global(settings, threads.word(4 * i))[0].real() for i in range(3)]
        return threads.as_array(found), threads.as_array(values)

    return start(*refs)


def _words(shape: Shape) -> int:
    """Of a piece of a token, as it is fetched."""
    return 6 * shape.parts if shape.parts else 4


def _fetch_piece(
    x: ir.Value, softmax: ir.Value | None, token: int, matrix: "_Matrix", i: int, shape: Shape
) -> list[Word]:
    """Eight features of a token; or of each of its parts, with its softmax's two numbers after them."""
    size, offset, real = shape.size * shape.r, matrix.offset(i), matrix.real(i)
    if softmax is None:
        return threads.load_global(x, offset + token * size * 2, 4, condition=real)
    head, found = (offset // 2) // (size // shape.heads), []
    for part in range(token * shape.parts, (token + 1) * shape.parts):
        found += threads.load_global(x, offset + part * size * 2, 4, condition=real)
        found += threads.load_global(softmax, (head + part * shape.heads) * 8, 2, condition=real)
    return found


def _merged(words: list[Word]) -> list[Word]:
    """A piece of a token of its parts'."""
    parts = [words[i : i + 6] for i in range(0, len(words), 6)]
    tops, sums = ([part[i].real() for part in parts] for i in (4, 5))
    top = tree(tops, Real.most)
    shares = [threads.power_of_two(one - top) * total for one, total in zip(tops, sums, strict=True)]
    inverse = threads.reciprocal(tree(shares, Real.__add__).most(LEAST_SUM))
    mixed = [threads.real(0.0)] * 8
    for part, share in zip(parts, shares, strict=True):
        weight = share * inverse
        mixed = [x.times_plus(weight, y) for x, y in zip(threads.eight_reals(part[:4]), mixed, strict=True)]
    return [threads.pack_bfloat16(*mixed[i : i + 2]) for i in range(0, 8, 2)]


def load(
    words, token_smem, left_smem, right_smem, warps_smem, *, shape: Shape, epsilon: float | None
) -> None:
    """What `fetch` found into shared memory, tokens after an RMS norm if ε is not None. Waits for the block."""
    matrices = [token_smem, left_smem, right_smem]
    t = shape.tokens

    @threads.on_threads(
        arg_types=(
            threads.per_thread(words.shape[0] // 128),
            *[plgpu.RefType(swizzled(ref.shape[1])) for ref in matrices],
            plgpu.RefType(),
        )
    )
    def copy(_, words, token, left, right, warps):
        found, fours = threads.words(words), []
        for k, pieces in enumerate(_pieces(shape)):
            each = _words(shape) if k < t else 4
            fours.append([found[each * i : each * (i + 1)] for i in range(len(pieces))])
            found = found[each * len(pieces) :]
        if shape.parts:
            fours[:t] = [[_merged(piece) for piece in of_token] for of_token in fours[:t]]
        if epsilon is not None:
            each = len(found) // len(fours[0])
            weights = [found[i : i + each] for i in range(0, len(found), each)]
            fours[:t] = _normed(fours[:t], weights, threads.address(warps), shape, epsilon)
        for ref, of_ref, pieces in zip((*[token] * t, left, right), fours, _pieces(shape), strict=True):
            for four, (matrix, i) in zip(of_ref, pieces, strict=True):
                with threads.when(matrix.exists(i)):
                    threads.store(threads.address(ref) + matrix.place(i), *four)
        threads.publish()
        threads.barrier(shape.threads)

    copy(words, *matrices, warps_smem)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """Rows and columns of a bf16 matrix that is copied, 16 bytes a thread at once, and what it is filled up to.

    There are `before` others like it above it in shared memory.
    """

    rows: int
    columns: int
    whole_rows: int
    whole_columns: int
    before: int = 0

    def count(self, threads: int) -> int:
        return -(-self.whole_rows * self.whole_columns // (8 * threads))

    def _chunk(self, i: int) -> tuple[Word, Word]:
        index = threads.thread() + i
        chunks = self.whole_columns // 8
        return index // chunks, index % chunks

    def exists(self, i: int) -> ir.Value:
        return threads.thread() + i < self.whole_rows * self.whole_columns // 8

    def real(self, i: int) -> ir.Value:
        row, chunk = self._chunk(i)
        return threads.both(row < self.rows, chunk < self.columns // 8)

    def offset(self, i: int) -> Word:
        row, chunk = self._chunk(i)
        return (row * self.columns + chunk * 8) * 2

    def place(self, i: int) -> Word:
        """Where the swizzle has it."""
        width = next(size for size in (128, 64, 32) if 2 * self.whole_columns % size == 0)
        row, chunk = self._chunk(i)
        chunks = width // 16  # of a tile's row
        tile = (row // 8) * (self.whole_columns // 8 // chunks) + chunk // chunks
        turned = (chunk % chunks) ^ ((row // (128 // width)) % chunks)
        above = 2 * self.before * self.whole_rows * self.whole_columns
        return tile * (8 * width) + (row % 8) * width + turned * 16 + above


def _pieces(shape: Shape) -> list[list[tuple[_Matrix, int]]]:
    """What a thread copies of each token, of L and of Rᵀ: pieces by the index that its first thread has."""
    matrices = (
        *(_Matrix(shape.size, shape.r, shape.rows, shape.columns, i) for i in range(shape.tokens)),
        _Matrix(shape.rows, shape.rows, shape.rows, shape.rows),
        _Matrix(shape.r, shape.r, shape.columns, shape.columns),
    )
    return [[(matrix, i * shape.threads) for i in range(matrix.count(shape.threads))] for matrix in matrices]


def _normed(
    tokens: list[list[list[Word]]], scales: list[list[Word]], warps: Word, shape: Shape, epsilon: float
) -> list[list[list[Word]]]:
    values = [[threads.eight_reals(each) for each in fours] for fours in tokens]
    weights = [threads.eight_reals(each) for each in scales]
    me, totals = threads.thread(), []
    for of_token in values:
        total = threads.real(0.0)
        for value in (value for piece in of_token for value in piece):
            total = value.times_plus(value, total)
        for distance in (1, 2, 4, 8, 16):
            total = total + threads.shuffle(total, distance)
        totals.append(total)
    with threads.when((me & (threads.WARP - 1)).equals(0)):
        for i, total in enumerate(totals):
            threads.store(warps + (me // threads.WARP) * 4, total, offset=4 * shape.warps * i)
    threads.barrier(shape.threads)
    normed = []
    for i, of_token in enumerate(values):
        sums = load_reals(warps, shape.warps, 4 * shape.warps * i)
        mean = tree(sums, Real.__add__) * (1 / (shape.size * shape.r))
        factor = threads.reciprocal_root(mean + epsilon)
        pieces = [
            [value * factor * weight for value, weight in zip(*piece, strict=True)]
            for piece in zip(of_token, weights, strict=True)
        ]
        normed.append(
            [[threads.pack_bfloat16(*piece[i : i + 2]) for i in range(0, len(piece), 2)] for piece in pieces]
        )
    return normed


def load_reals(at: Word, count: int, offset: int = 0) -> list[Real]:
    """A multiple of four."""
    return [each.real() for i in range(0, count, 4) for each in threads.load(at, 4, offset=offset + 4 * i)]


def turn(token_smem, right_smem, left_smem, *, shape: Shape) -> list[jax.Array]:
    """This warpgroup's part of each token's `Zᵀ`, bf16.

    token_smem is free when all have come here.
    """
    line, share = place(shape)
    columns = shape.rows // shape.shares

    def products(pairs, n: int):
        """All of them under way before one is waited for."""

        def run(*accs):
            for acc, (a, b) in zip(accs, pairs, strict=True):
                plgpu.wgmma(acc, a, b)
            return [acc[...].astype(jnp.bfloat16) for acc in accs]

        return pl.run_scoped(run, *[plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, n), jnp.float32)] * len(pairs))

    lines = right_smem.at[pl.ds(line * WGMMA_ROWS, WGMMA_ROWS)]
    mine = left_smem.at[pl.ds(share * columns, columns)].T
    tokens = [token_smem.at[pl.ds(i * shape.rows, shape.rows)].T for i in range(shape.tokens)]
    z = []
    for i in range(0, shape.tokens, _at_once(shape)):
        y = products([(lines, token) for token in tokens[i : i + _at_once(shape)]], shape.rows)
        z += products([(of_token, mine) for of_token in y], columns)
    return z


def _at_once(shape: Shape) -> int:
    """Tokens whose products are under way together."""
    return max(_SUMS // (shape.rows // 2), 1)


def place(shape: Shape):
    """Which lines and which columns of `Zᵀ` this warpgroup has."""
    group = lax.axis_index("warpgroup")
    return lax.rem(group, shape.lines), lax.rem(lax.div(group, shape.lines), shape.shares)


def tree(values: list, combine):
    """All values combined, two by two, so that none waits long for another."""
    while len(values) > 1:
        values = [
            combine(*values[i : i + 2]) if i + 1 < len(values) else values[i]
            for i in range(0, len(values), 2)
        ]
    return values[0]
