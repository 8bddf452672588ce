"""Loads tokens and the rotation's factors through threads into shared memory (Pallas Mosaic GPU).

On their way, tokens are merged from the splits that attention left them in, or gated, and normalised.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.ops.attention.splits import LEAST_SUM
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.gate import silu_gate_pairs
from twla_jax.ops.hopper.swizzle import swizzle_transforms
from twla_jax.ops.hopper.threads import Real, Word
from twla_jax.ops.rotate_quantize.gpu_pieces import Pieces, pieces_of_factors, pieces_of_tokens
from twla_jax.ops.rotate_quantize.gpu_rotation import TokenShape, load_reals, tree

_PIECE_WORDS = 4  # words of a piece: eight features
_SPLIT_WORDS = _PIECE_WORDS + 2  # a piece of a split, and its softmax's two numbers


def prefetch_tokens(
    x_gmem, norm_gmem, settings_gmem, *, shape: TokenShape, more: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Start the loads of tokens and the norm's weights into threads, for `prepare_tokens`; return these and settings.

    The copy engine would bring them in turn with the weights, so the threads load them. `x_gmem` lists the tokens or,
    for attention left in splits, mixes and softmaxes; it is empty if tokens are to be received. Nothing is read if
    `more` is 0.
    """
    refs = [settings_gmem, *x_gmem, *([] if norm_gmem is None else [norm_gmem])]
    flags = [] if more is None else [more]
    tokens = pieces_of_tokens(shape)
    wide = 0 if norm_gmem is None else norm_gmem.dtype.itemsize // 2
    given = tokens if x_gmem else []
    count = sum(len(pieces) for pieces in given) * _words(shape) + _PIECE_WORDS * wide * len(tokens[0])

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


def prefetch_factors(left_gmem, right_gmem, *, shape: TokenShape) -> jax.Array:
    """Start the loads of both factors into threads, for `store_factors`."""
    pieces = pieces_of_factors(shape)

    @threads.on_threads(
        arg_types=[plgpu.RefType()] * 2,
        return_type=threads.values(_PIECE_WORDS * sum(map(len, pieces)), jnp.int32),
    )
    def start(_, *refs):
        found = [_fetch_pieces(ref, of_factor) for ref, of_factor in zip(refs, pieces, strict=True)]
        return threads.as_array([word for each in found for word in each])

    return start(left_gmem, right_gmem)


def _fetch_pieces(ref, pieces: Pieces, wide: int = 1, there: Sequence[ir.Value] = ()) -> list[Word]:
    """Load pieces of eight numbers, each of `wide` times two bytes."""
    return [
        word
        for matrix, i in pieces
        for split in range(wide)
        for word in threads.load_global(
            ref, matrix.offset(i) * wide + 16 * split, 4, condition=threads.both(matrix.real(i), *there)
        )
    ]


def _words(shape: TokenShape) -> int:
    """Return the words of a piece of a token, as it is loaded."""
    if shape.splits:
        return _SPLIT_WORDS * shape.splits
    return 2 * _PIECE_WORDS if shape.gated else _PIECE_WORDS


def _fetch_piece(
    x: ir.Value,
    softmax: ir.Value | None = None,
    *,
    token: int,
    offset: Word,
    real: ir.Value,
    shape: TokenShape,
) -> list[Word]:
    """Load eight features of a token, after those of its gate; or of each split, with its softmax's two numbers."""
    size = shape.size * shape.r
    if softmax is None:
        matrices = 2 if shape.gated else 1
        return [
            word
            for each in range(token * matrices, (token + 1) * matrices)
            for word in threads.load_global(x, offset + each * size * 2, 4, condition=real)
        ]
    head, found = (offset // 2) // (size // shape.heads), []
    for split in range(token * shape.splits, (token + 1) * shape.splits):
        found += threads.load_global(x, offset + split * size * 2, 4, condition=real)
        found += threads.load_global(softmax, (head + split * shape.heads) * 8, 2, condition=real)
    return found


def receive_tokens(words, sent_gmem, tag, *, shape: TokenShape) -> jax.Array:
    """Return the words of `prefetch_tokens`, with the tokens `[tokens, m]` that are sent under this tag before them."""
    tokens = pieces_of_tokens(shape)
    count, size = words.shape[0] // 128, shape.size * shape.r
    found = count + _PIECE_WORDS * sum(len(pieces) for pieces in tokens)

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


def prepare_tokens(words, levels, warps_smem, *, shape: TokenShape, epsilon: float | None) -> jax.Array:
    """Return what `prefetch_tokens` loaded, merged or gated, and after an RMS norm unless ε is None.

    `levels` is the first number of the settings.
    """
    if not (shape.splits or shape.gated) and epsilon is None:
        return words
    tokens = pieces_of_tokens(shape)
    width, count = _words(shape), words.shape[0] // 128

    @threads.on_threads(
        arg_types=(threads.per_thread(count), plgpu.RefType()), return_type=threads.values(count, jnp.int32)
    )
    def run(_, words, warps):
        found, of_token = threads.words(words), width * len(tokens[0])
        fours = [_each(found[of_token * i :], width, len(tokens[0])) for i in range(len(tokens))]
        if shape.splits:
            fours = [[_merged(piece) for piece in each] for each in fours]
        if shape.gated:
            fours = [
                [silu_gate_pairs(piece[:_PIECE_WORDS], piece[_PIECE_WORDS:]) for piece in each]
                for each in fours
            ]
        if epsilon is not None:
            scales = found[of_token * len(tokens) :]
            scales = _each(scales, len(scales) // len(tokens[0]), len(tokens[0]))
            fours = _normed(fours, scales, threads.address(warps), shape, epsilon)
        for i, four in enumerate(four for each in fours for four in each):
            found[width * i : width * i + _PIECE_WORDS] = four[:_PIECE_WORDS]
        return threads.as_array(found)

    if not shape.splits:
        return run(words, warps_smem)
    # A one-trip loop: it stops the compiler from hoisting the wait above the prefetch of weights. For a norm alone it
    # may hoist it: a step with weights prefetched earlier was no faster.
    return lax.fori_loop(0, jnp.where(levels > 0, 1, 0), lambda _, words: run(words, warps_smem), words)


def _merged(words: list[Word]) -> list[Word]:
    """Return a piece of a token, merged from its splits."""
    splits = [words[i : i + _SPLIT_WORDS] for i in range(0, len(words), _SPLIT_WORDS)]
    tops, sums = ([split[_PIECE_WORDS + i].real() for split in splits] for i in range(2))
    top = tree(tops, Real.most)
    shares = [threads.power_of_two(one - top) * total for one, total in zip(tops, sums, strict=True)]
    inverse = threads.reciprocal(tree(shares, Real.__add__).most(LEAST_SUM))
    mixed = [threads.real(0.0)] * 8
    for split, share in zip(splits, shares, strict=True):
        weight = share * inverse
        mixed = [
            x.times_plus(weight, y)
            for x, y in zip(threads.eight_reals(split[:_PIECE_WORDS]), mixed, strict=True)
        ]
    return [threads.pack_bfloat16(*mixed[i : i + 2]) for i in range(0, 8, 2)]


def store_tokens(words, token_smem, *, shape: TokenShape) -> None:
    """Store what `prepare_tokens` returned in shared memory, where all threads have it after `synchronize`."""

    @threads.on_threads(
        arg_types=(
            threads.per_thread(words.shape[0] // 128),
            plgpu.RefType(swizzle_transforms(2, shape.columns)),
        )
    )
    def copy(_, words, token):
        _store(threads.words(words), [token] * shape.tokens, pieces_of_tokens(shape), _words(shape))

    copy(words, token_smem)


def store_factors(words, left_smem, right_smem, *, shape: TokenShape) -> None:
    """Store what `prefetch_factors` loaded in shared memory, where all threads have it after `synchronize`."""
    refs = [plgpu.RefType(swizzle_transforms(2, each)) for each in (shape.rows, shape.columns)]

    @threads.on_threads(arg_types=(threads.per_thread(words.shape[0] // 128), *refs))
    def copy(_, words, *factors):
        _store(threads.words(words), factors, pieces_of_factors(shape), _PIECE_WORDS)

    copy(words, left_smem, right_smem)


def _store(words: list[Word], refs: Sequence[ir.Value], pieces: Sequence[Pieces], width: int) -> None:
    """Store the first four of every `width` words."""
    for ref, of_matrix in zip(refs, pieces, strict=True):
        for four, (matrix, i) in zip(_each(words, width, len(of_matrix)), of_matrix, strict=True):
            with threads.when(matrix.exists(i)):
                threads.store(threads.address(ref) + matrix.place(i), *four[:_PIECE_WORDS])
        words = words[width * len(of_matrix) :]


def synchronize(*, shape: TokenShape) -> None:
    """Wait for the block's threads, and for what they wrote to shared memory."""

    @threads.on_threads()
    def wait(_):
        threads.publish()
        threads.barrier(shape.threads)

    wait()


def _each(words: list[Word], width: int, count: int) -> list[list[Word]]:
    return [words[width * i :][:width] for i in range(count)]


def _normed(
    tokens: list[list[list[Word]]], scales: list[list[Word]], warps: Word, shape: TokenShape, epsilon: float
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
