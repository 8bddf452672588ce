"""Attends with a warp and its tensor cores to the positions that it reads (Mosaic GPU).

Scores are `K · qᵀ`, with 16 positions as rows of `mma.sync` and up to eight queries as columns; the mix is `vᵀ · P`.
A sum of products does not depend on the order of its terms, so a thread reads whole pieces of keys and values, and the
queries follow their order: nothing is transposed but the small matrix of weights. int8 entries become fp16, exactly.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.decode_attention.gpu_grouped_shape import (
    CHUNK,
    PIECE,
    GroupShape,
    MatrixLane,
    constant_swizzle,
    line_of,
    swizzle,
)
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Real, Word

LOWEST = -1e30  # replaces −∞, since −∞ − (−∞) is not a number
_LEAST_SCALE = 1e-30  # replaces smaller magnitudes of a value's scale, whose logarithm is taken
_SPLAT = plgpu.Layout.WG_SPLAT


def initial_state(*, shape: GroupShape) -> jax.Array:
    """Return the state of a warp that has seen no position."""

    @threads.on_threads(return_type=threads.values(shape.state, jnp.float32))
    def run(_):
        zero, lowest = threads.real(0.0), threads.real(LOWEST)
        return threads.as_array([lowest] * 2 + [zero] * (shape.state - 2))

    return run()


def weigh(state, q, ring_smem, slot, step, start, end, *, shape: GroupShape) -> tuple[jax.Array, jax.Array]:
    """Return the state, faded to the new largest score, and the weights of a step's values, ready for `mix`.

    The scales of values are part of the weights. So that these fit fp16, the largest score is that of a key with the
    logarithm of its value's scale added.

    Args:
      state: largest scores, sums, and mixes of values.
      q: words of the queries, and the factors of their scores, from `gpu_grouped_heads.load_queries`.
      ring_smem: as for `start_copies`.
      slot: number of the slot that holds the step's entries.
      step: number of the step.
      start: the first position that counts.
      end: the first position that no longer counts.
      shape: how the heads are split up.
    """
    arrays = [state, *q]

    @threads.on_threads(
        arg_types=(
            *[threads.per_thread(each.shape[0] // 128) for each in arrays],
            *[_SPLAT] * 4,
            plgpu.RefType(),
        ),
        return_type=(threads.values(shape.state, jnp.float32), threads.values(2, jnp.int32)),
    )
    def run(_, state, q, factors, slot, step, start, end, ring):
        slot, step, start, end = map(threads.splat_word, (slot, step, start, end))
        me, nothing, zero = MatrixLane(shape), threads.word(0), threads.real(0.0)
        at = me.slot(threads.address(ring), slot)
        seen = [threads.both(each >= start, each < end) for each in me.keys(step)]
        scores = _scores(threads.words(q), at, me, shape)
        factors, numbers = threads.reals(factors), threads.reals(state)
        tops, totals, mixed = numbers[:2], numbers[2:4], numbers[4:]
        shifts, inverses = [zero] * 2, [threads.real(1.0)] * 2
        of_keys, signs = [threads.real(1.0)] * 2, []
        if shape.quantized:
            at_scales, one = at + (4 * shape.slot - 2 * CHUNK * 4), threads.real(1.0)
            found = [
                threads.load(at_scales + me.row * 4, offset=4 * (CHUNK * kind + 8 * i))[0]
                for kind in range(2)
                for i in range(2)
            ]
            # Memory past the last position may hold anything, NaN included.
            of_keys = [
                threads.select(yes, each, nothing).real() for each, yes in zip(found[:2], seen, strict=True)
            ]
            of_values = [
                threads.select(yes, each.real(), one) for each, yes in zip(found[2:], seen, strict=True)
            ]
            sizes = [each.most(zero - each).most(_LEAST_SCALE) for each in of_values]
            shifts, inverses = (
                [op(each) for each in sizes] for op in (threads.logarithm, threads.reciprocal)
            )
            signs = [value * inverse for value, inverse in zip(of_values, inverses, strict=True)]
        weights, fades = [], []
        for query in range(2):
            mine = [
                threads.select(
                    yes,
                    scores[2 * i + query].times_plus(factors[query] * of_keys[i], shifts[i]),
                    threads.real(LOWEST),
                )
                for i, yes in enumerate(seen)
            ]
            top = mine[0].most(mine[1])
            for distance in (4, 8, 16):
                top = top.most(threads.shuffle(top, distance))
            top = top.most(tops[query])
            fade = threads.power_of_two(tops[query] - top)
            of_query = [
                threads.select(yes, threads.power_of_two(score - top), zero)
                for score, yes in zip(mine, seen, strict=True)
            ]
            total = totals[query] * fade
            for weight, inverse in zip(of_query, inverses, strict=True):
                total = weight.times_plus(inverse, total)
            tops[query], totals[query] = top, total
            if shape.quantized:
                of_query = [weight * sign for weight, sign in zip(of_query, signs, strict=True)]
            weights.append(of_query)
            fades.append(fade)
        mixed = [each * fades[i % 2] for i, each in enumerate(mixed)]
        pack = threads.pack_float16 if shape.quantized else threads.pack_bfloat16
        # Rows of positions become rows of queries, as the second factor of a product needs them.
        columns = [threads.transposed(pack(*pair)) for pair in zip(*weights, strict=True)]
        return threads.as_array([*tops, *totals, *mixed]), threads.as_array(columns)

    return run(*arrays, slot, step, start, end, ring_smem)


def _scores(q: list[Word], at: Word, me: MatrixLane, shape: GroupShape) -> list[Real]:
    """Return the products of both positions' keys with both queries."""
    zero, j, whole = threads.real(0.0), 0, shape.d * shape.size
    scores, others = [zero] * 4, [zero] * 4  # two sums, as a product waits for the one before it
    within = me.column * PIECE ^ swizzle(me.row)
    at = at + line_of(me.row, whole)
    for piece in range(0, whole, 4 * PIECE):
        here = at + (within ^ piece & 64)
        pieces = [threads.load(here, 4, offset=8 * i * whole + (piece & ~64)) for i in range(2)]
        if shape.quantized:
            parts = [[half for word in words for half in threads.float16_bytes(word)] for words in pieces]
        else:
            parts = pieces
        for i in range(0, len(parts[0]), 2):
            a = [parts[0][i], parts[1][i], parts[0][i + 1], parts[1][i + 1]]
            new = threads.multiply_16_bits(a, q[j : j + 2], scores, bfloat16=not shape.quantized)
            scores, others, j = others, new, j + 2
    return [one + other for one, other in zip(scores, others, strict=True)]


def mix(state, weights, ring_smem, slot, step, start, end, *, shape: GroupShape) -> jax.Array:
    """Return the state with a step's values, times the weights, added; arguments as for `weigh`."""
    arrays = [state, weights]

    @threads.on_threads(
        arg_types=(
            *[threads.per_thread(each.shape[0] // 128) for each in arrays],
            *[_SPLAT] * 4,
            plgpu.RefType(),
        ),
        return_type=threads.values(shape.state, jnp.float32),
    )
    def run(_, state, weights, slot, step, start, end, ring):
        slot, step, start, end = map(threads.splat_word, (slot, step, start, end))
        me, out, columns = MatrixLane(shape), threads.reals(state), threads.words(weights)
        whole = shape.d * shape.size
        size, nothing, tile = min(PIECE, whole // 8), threads.word(0), 4
        at = me.slot(threads.address(ring), slot) + (CHUNK * whole) + line_of(me.column * 2, whole)
        within = me.row * size ^ swizzle(me.column * 2)
        places = [(at + (within ^ constant_swizzle(i)), i * whole & ~127) for i in (0, 1, 8, 9)]
        seen = [threads.both(each >= start, each < end) for each in me.values(step)]
        for piece in range(0, whole // 8, size):
            of_positions = [
                threads.load(place, size // 4, offset=offset + 8 * piece) for place, offset in places
            ]
            if not shape.quantized:  # memory past the last position may hold anything; int8 times 0 is 0
                of_positions = [
                    [threads.select(yes, word, nothing) for word in words]
                    for words, yes in zip(of_positions, seen, strict=True)
                ]
            for words in zip(*of_positions, strict=True):
                low, high = (_columns(words[i], words[i + 1], shape) for i in (0, 2))
                for i in range(0, len(low), 2):
                    out[tile : tile + 4] = threads.multiply_16_bits(
                        [low[i], low[i + 1], high[i], high[i + 1]],
                        columns,
                        out[tile : tile + 4],
                        bfloat16=not shape.quantized,
                    )
                    tile += 4
        return threads.as_array(out)

    return run(*arrays, slot, step, start, end, ring_smem)


def _columns(one: Word, other: Word, shape: GroupShape) -> list[Word]:
    """Return pairs of the same feature of two positions, for each feature in both words."""
    if shape.quantized:
        pairs = [threads.permute(one, other, order) for order in (0x5140, 0x7362)]
        return [each for pair in pairs for each in threads.float16_bytes(pair)]
    return [threads.permute(one, other, order) for order in (0x5410, 0x7632)]
