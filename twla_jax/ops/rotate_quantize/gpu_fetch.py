"""Tokens and the rotation's factors, from memory through threads into shared memory (Pallas Mosaic GPU).

On their way tokens are merged of the parts that attention left them in, or gated, and normed.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.ops.attention.parts import LEAST_SUM
from twla_jax.ops.hopper import threads as threads
from twla_jax.ops.hopper.threads import Real, Word
from twla_jax.ops.rotate_quantize.gpu_token import Shape, load_reals, swizzled, tree

_OF_PIECE = 4  # words: eight features
_OF_PART = _OF_PIECE + 2  # a piece of a part, and its softmax's two numbers


def fetch(
    x_gmem, norm_gmem, settings_gmem, *, shape: Shape, more: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Starts the way of the tokens and the norm's weights to the threads, for `ready`; and the settings.

    Not by the copy engine, which would bring them in turn with the weights. `x_gmem` lists the tokens or, of attention
    left in parts, mixes and softmaxes; nothing, if they are to be `receive`d. Nothing is read if `more` is zero.
    """
    refs = [settings_gmem, *x_gmem, *([] if norm_gmem is None else [norm_gmem])]
    flags = [] if more is None else [more]
    tokens = _pieces_of_tokens(shape)
    wide = 0 if norm_gmem is None else norm_gmem.dtype.itemsize // 2
    given = tokens if x_gmem else []
    count = sum(len(pieces) for pieces in given) * _words(shape) + _OF_PIECE * wide * len(tokens[0])

    @threads.on_threads(
        arg_types=(*[plgpu.Layout.WG_SPLAT] * len(flags), *[plgpu.RefType()] * len(refs)),
        return_type=(threads.values(count, jnp.int32), threads.values(3, jnp.float32)),
    )
    def start(_, *arguments):
        there = [threads.splat_word(flag) >= 1 for flag in arguments[: len(flags)]]
        settings, *refs = arguments[len(flags) :]
        found = []
        for token, pieces in enumerate(given):
            for matrix, i in pieces:
                found += _fetch_piece(
                    *refs[: len(x_gmem)],
                    token=token,
                    offset=matrix.offset(i),
                    real=threads.both(matrix.real(i), *there),
                    shape=shape,
                )
        if wide:
            found += _fetch_pieces(refs[-1], tokens[0], wide, there)
        values = [threads.load_global(settings, threads.word(4 * i))[0].real() for i in range(3)]
        return threads.as_array(found), threads.as_array(values)

    return start(*flags, *refs)


def fetch_factors(left_gmem, right_gmem, *, shape: Shape) -> jax.Array:
    """Starts the way of both factors to the threads, for `load_factors`."""
    pieces = _pieces_of_factors(shape)

    @threads.on_threads(
        arg_types=[plgpu.RefType()] * 2,
        return_type=threads.values(_OF_PIECE * sum(map(len, pieces)), jnp.int32),
    )
    def start(_, *refs):
        found = [_fetch_pieces(ref, of_factor) for ref, of_factor in zip(refs, pieces, strict=True)]
        return threads.as_array([word for each in found for word in each])

    return start(left_gmem, right_gmem)


def _fetch_pieces(ref, pieces: "_Pieces", wide: int = 1, there: Sequence[ir.Value] = ()) -> list[Word]:
    """Eight numbers each, of so many times two bytes."""
    return [
        word
        for matrix, i in pieces
        for part in range(wide)
        for word in threads.load_global(
            ref, matrix.offset(i) * wide + 16 * part, 4, condition=threads.both(matrix.real(i), *there)
        )
    ]


def _words(shape: Shape) -> int:
    """Of a piece of a token, as it is fetched."""
    if shape.parts:
        return _OF_PART * shape.parts
    return 2 * _OF_PIECE if shape.gated else _OF_PIECE


def _fetch_piece(
    x: ir.Value,
    softmax: ir.Value | None = None,
    *,
    token: int,
    offset: Word,
    real: ir.Value,
    shape: Shape,
) -> list[Word]:
    """Eight features of a token, after those of its gate; or of each part, and then its softmax's two numbers."""
    size = shape.size * shape.r
    if softmax is None:
        matrices = 2 if shape.gated else 1
        return [
            word
            for each in range(token * matrices, (token + 1) * matrices)
            for word in threads.load_global(x, offset + each * size * 2, 4, condition=real)
        ]
    head, found = (offset // 2) // (size // shape.heads), []
    for part in range(token * shape.parts, (token + 1) * shape.parts):
        found += threads.load_global(x, offset + part * size * 2, 4, condition=real)
        found += threads.load_global(softmax, (head + part * shape.heads) * 8, 2, condition=real)
    return found


def receive(words, sent_gmem, tag, *, shape: Shape) -> jax.Array:
    """What `fetch` found but for tokens, with tokens that are sent, `[tokens, m]` words with this tag, before it."""
    tokens = _pieces_of_tokens(shape)
    count, size = words.shape[0] // 128, shape.size * shape.r
    found = count + _OF_PIECE * sum(len(pieces) for pieces in tokens)

    @threads.on_threads(
        arg_types=(threads.per_thread(count), threads.per_thread(1), plgpu.RefType()),
        return_type=threads.values(found, jnp.int32),
    )
    def run(_, words, tag, sent):
        (tag,), found = threads.words(tag), []
        pieces = [(token, *piece) for token, of_token in enumerate(tokens) for piece in of_token]
        offsets = [
            threads.select(matrix.real(i), matrix.offset(i) * 2, threads.word(0)) + token * size * 4 + half
            for token, matrix, i in pieces
            for half in (0, 16)
        ]
        low = [each & 0xFFFF for each in threads.receive(sent, offsets, tag)]
        for k, (_, matrix, i) in enumerate(pieces):
            mine, real = low[8 * k : 8 * k + 8], matrix.real(i)
            four = [mine[j] + (mine[j + 1] << 16) for j in range(0, 8, 2)]
            found += [threads.select(real, each, threads.word(0)) for each in four]
        return threads.as_array(found + threads.words(words))

    return run(words, tag, sent_gmem)


def ready(words, levels, warps_smem, *, shape: Shape, epsilon: float | None) -> jax.Array:
    """What `fetch` found, with tokens merged of their parts or gated, and after an RMS norm if ε is not None.

    `levels` are the settings' first number.
    """
    if not (shape.parts or shape.gated) and epsilon is None:
        return words
    tokens = _pieces_of_tokens(shape)
    width, count = _words(shape), words.shape[0] // 128

    @threads.on_threads(
        arg_types=(threads.per_thread(count), plgpu.RefType()), return_type=threads.values(count, jnp.int32)
    )
    def run(_, words, warps):
        found, of_token = threads.words(words), width * len(tokens[0])
        fours = [_each(found[of_token * i :], width, len(tokens[0])) for i in range(len(tokens))]
        if shape.parts:
            fours = [[_merged(piece) for piece in each] for each in fours]
        if shape.gated:
            fours = [[_gated(piece) for piece in each] for each in fours]
        if epsilon is not None:
            scales = found[of_token * len(tokens) :]
            scales = _each(scales, len(scales) // len(tokens[0]), len(tokens[0]))
            fours = _normed(fours, scales, threads.address(warps), shape, epsilon)
        for i, four in enumerate(four for each in fours for four in each):
            found[width * i : width * i + _OF_PIECE] = four[:_OF_PIECE]
        return threads.as_array(found)

    if not shape.parts:
        return run(words, warps_smem)
    # In a loop, of one round, as the compiler would have threads wait for what is in none before they ask for weights.
    # For a norm alone it may: a step with weights asked for earlier was no faster.
    return lax.fori_loop(0, jnp.where(levels > 0, 1, 0), lambda _, words: run(words, warps_smem), words)


def _merged(words: list[Word]) -> list[Word]:
    """A piece of a token of its parts'."""
    parts = [words[i : i + _OF_PART] for i in range(0, len(words), _OF_PART)]
    tops, sums = ([part[_OF_PIECE + i].real() for part in parts] for i in range(2))
    top = tree(tops, Real.most)
    shares = [threads.power_of_two(one - top) * total for one, total in zip(tops, sums, strict=True)]
    inverse = threads.reciprocal(tree(shares, Real.__add__).most(LEAST_SUM))
    mixed = [threads.real(0.0)] * 8
    for part, share in zip(parts, shares, strict=True):
        weight = share * inverse
        mixed = [
            x.times_plus(weight, y) for x, y in zip(threads.eight_reals(part[:_OF_PIECE]), mixed, strict=True)
        ]
    return [threads.pack_bfloat16(*mixed[i : i + 2]) for i in range(0, 8, 2)]


def _gated(words: list[Word]) -> list[Word]:
    """`silu(gate) · x` of a piece's gate and x, rounded to bf16 after every step, as XLA does it."""
    found = []
    for gate, x in zip(words[:_OF_PIECE], words[_OF_PIECE:], strict=True):
        powers = [threads.exponential(threads.real(0.0) - each) for each in threads.unpack_bfloat16(gate)]
        divisors = [each + 1.0 for each in threads.unpack_bfloat16(threads.pack_bfloat16(*powers))]
        divisors = threads.unpack_bfloat16(threads.pack_bfloat16(*divisors))
        sigmoid = threads.pack_bfloat16(*map(threads.reciprocal, divisors))
        found.append(threads.multiply_bfloat16(threads.multiply_bfloat16(gate, sigmoid), x))
    return found


def load(words, token_smem, *, shape: Shape) -> None:
    """What `fetch` found, and `ready` made of it, into shared memory, where all have it after `meet`."""

    @threads.on_threads(
        arg_types=(threads.per_thread(words.shape[0] // 128), plgpu.RefType(swizzled(shape.columns)))
    )
    def copy(_, words, token):
        _store(threads.words(words), [token] * shape.tokens, _pieces_of_tokens(shape), _words(shape))

    copy(words, token_smem)


def load_factors(words, left_smem, right_smem, *, shape: Shape) -> None:
    """What `fetch_factors` found into shared memory, where all have it after `meet`."""
    refs = [plgpu.RefType(swizzled(each)) for each in (shape.rows, shape.columns)]

    @threads.on_threads(arg_types=(threads.per_thread(words.shape[0] // 128), *refs))
    def copy(_, words, *factors):
        _store(threads.words(words), factors, _pieces_of_factors(shape), _OF_PIECE)

    copy(words, left_smem, right_smem)


def _store(words: list[Word], refs: Sequence[ir.Value], pieces: "Sequence[_Pieces]", width: int) -> None:
    """The first four of every so many words."""
    for ref, of_matrix in zip(refs, pieces, strict=True):
        for four, (matrix, i) in zip(_each(words, width, len(of_matrix)), of_matrix, strict=True):
            with threads.when(matrix.exists(i)):
                threads.store(threads.address(ref) + matrix.place(i), *four[:_OF_PIECE])
        words = words[width * len(of_matrix) :]


def meet(*, shape: Shape) -> None:
    """Waits for the block's threads, and for what they wrote to shared memory."""

    @threads.on_threads()
    def wait(_):
        threads.publish()
        threads.barrier(shape.threads)

    wait()


def _each(words: list[Word], width: int, count: int) -> list[list[Word]]:
    return [words[width * i :][:width] for i in range(count)]


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


type _Pieces = list[tuple[_Matrix, int]]  # by the index that its first thread has


def _pieces_of_tokens(shape: Shape) -> list[_Pieces]:
    """What a thread copies of each token."""
    matrices = (_Matrix(shape.size, shape.r, shape.rows, shape.columns, i) for i in range(shape.tokens))
    return [_pieces(matrix, shape) for matrix in matrices]


def _pieces_of_factors(shape: Shape) -> list[_Pieces]:
    """What a thread copies of L and of Rᵀ."""
    left = _Matrix(shape.rows, shape.rows, shape.rows, shape.rows)
    right = _Matrix(shape.r, shape.r, shape.columns, shape.columns)
    return [_pieces(matrix, shape) for matrix in (left, right)]


def _pieces(matrix: _Matrix, shape: Shape) -> _Pieces:
    return [(matrix, i * shape.threads) for i in range(matrix.count(shape.threads))]


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
