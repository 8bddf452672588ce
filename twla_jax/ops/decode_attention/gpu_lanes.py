"""Attends with a warp to the positions that it reads, and writes the new token's entry (Mosaic GPU).

int8 entries become whole numbers; their scales multiply the score of a key and the weight of a value.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.decode_attention.gpu_heads import BYTES, HeadShape, KeyLane
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Real, Word

_LOWEST = -1e30  # replaces −∞, since −∞ − (−∞) is not a number
_SPLAT = plgpu.Layout.WG_SPLAT


def write_entry(new, cache, first_head, split, length, *, shape: HeadShape) -> None:
    """Write the key and the value into the cache, by the first of the warps that share their head."""

    @threads.on_threads(
        arg_types=(threads.per_thread(new.shape[0] // 128), *[_SPLAT] * 3, *[plgpu.RefType()] * len(cache))
    )
    def run(_, new, first_head, split, length, *refs):
        me, length = KeyLane(shape, threads.splat_word(split)), threads.splat_word(length)
        of_kv_head = threads.splat_word(first_head) % (shape.heads // shape.kv_heads)
        mine = threads.both(me.worker.equals(0), of_kv_head.equals(0), me.row.equals(0))
        key, value, scales = _entry_fields(new, shape)
        with threads.when(mine):
            for ref, vector in zip(refs, (key, value), strict=False):
                if shape.quantized:
                    packed = [threads.pack_bytes(vector[i : i + 4]) for i in range(0, shape.count, 4)]
                else:
                    packed = [threads.pack_bfloat16(*vector[i : i + 2]) for i in range(0, shape.count, 2)]
                offset = (length * shape.d + me.feature) * (BYTES // shape.count)
                threads.store_global_words(ref, offset, packed)
        if shape.quantized:
            with threads.when(threads.both(mine, me.feature.equals(0))):
                for ref, scale in zip(refs[2:], scales, strict=True):
                    threads.store_real(ref, length, scale)

    run(new, first_head, split, length, *cache)


def _entry_fields(new, shape: HeadShape) -> tuple[list[Real], list[Real], list[Real]]:
    """Return key, value and scales from the second result of `rotate_heads`."""
    values, count = threads.reals(new), shape.count
    return values[:count], values[count : 2 * count], values[2 * count :]


def initial_state(q, new, split, *, shape: HeadShape) -> jax.Array:
    """Return for each query the largest score, the sum, and the mix of values: of the new token, or of nothing."""

    @threads.on_threads(
        arg_types=(*[threads.per_thread(each.shape[0] // 128) for each in (q, new)], _SPLAT),
        return_type=threads.values(shape.state, jnp.float32),
    )
    def run(_, q, new, split):
        me = KeyLane(shape, threads.splat_word(split))
        key, value, scales = _entry_fields(new, shape)
        if scales:
            key, value = ([x * scale for x in of] for of, scale in zip((key, value), scales, strict=True))
        mine = me.worker.equals(0)
        # Sums go over the positions that are read at once; the new one's counts once.
        once = threads.both(mine, me.row.equals(0))
        zero, out = threads.real(0.0), []
        for query in _queries(q, shape):
            score = me.over_features(dot(query, key), Real.__add__) * score_factor(shape)
            out += [
                threads.select(mine, score, threads.real(_LOWEST)),
                threads.select(once, threads.real(1.0), zero),
                *[threads.select(once, each, zero) for each in value],
            ]
        return threads.as_array(out)

    return run(q, new, split)


def _queries(q, shape: HeadShape) -> list[list[Real]]:
    values = threads.reals(q)
    return [values[i : i + shape.count] for i in range(0, len(values), shape.count)]


def score_factor(shape) -> float:
    """Return what scores are multiplied by, for powers of two instead of the exponential."""
    return shape.d**-0.5 * math.log2(math.e)


def dot(a: list[Real], b: list[Real]) -> Real:
    """Return the sum of products."""
    total = a[0] * b[0]
    for one, other in zip(a[1:], b[1:], strict=True):
        total = one.times_plus(other, total)
    return total


def attend_step(state, q, entries, step, split, limits, *, shape: HeadShape) -> jax.Array:
    """Return the state with those positions of a step added that are within the limits."""
    arrays, loads, words = (state, q, entries), shape.config.loads, BYTES // 4

    @threads.on_threads(
        arg_types=(*[threads.per_thread(each.shape[0] // 128) for each in arrays], *[_SPLAT] * 4),
        return_type=threads.values(shape.state, jnp.float32),
    )
    def run(_, state, q, entries, step, split, start, end):
        step, split, start, end = map(threads.splat_word, (step, split, start, end))
        me, found, nothing = KeyLane(shape, split), threads.words(entries), threads.word(0)
        positions = [me.position(step, i) for i in range(loads)]
        seen = [threads.both(each >= start, each < end) for each in positions]
        of_keys, of_values = (
            [found[(kind * loads + i) * words :][:words] for i in range(loads)] for kind in range(2)
        )
        scales = found[2 * loads * words :]
        queries, scores = _queries(q, shape), []
        for i, (key, yes) in enumerate(zip(of_keys, seen, strict=True)):
            k = _entry(key, shape)
            factor = scales[i].real() * score_factor(shape) if scales else score_factor(shape)
            row = [me.over_features(dot(query, k), Real.__add__) * factor for query in queries]
            scores.append([threads.select(yes, score, threads.real(_LOWEST)) for score in row])
        before, out, size = threads.reals(state), [], 2 + shape.count
        for j in range(len(queries)):
            top, total, *mixed = before[j * size : (j + 1) * size]
            mine = [row[j] for row in scores]
            new_top = me.over_rows(functools.reduce(Real.most, mine), Real.most).most(top)
            fade = threads.power_of_two(top - new_top)
            weights = [
                threads.select(yes, threads.power_of_two(score - new_top), threads.real(0.0))
                for score, yes in zip(mine, seen, strict=True)
            ]
            out.append([new_top, functools.reduce(Real.__add__, weights, total * fade)])
            out[-1] += [each * fade for each in mixed]
            for row, weight in zip(scores, weights, strict=True):
                row[j] = weight
        for i, (value, yes) in enumerate(zip(of_values, seen, strict=True)):
            # Memory past the last position may hold anything, NaN included.
            v = _entry([threads.select(yes, each, nothing) for each in value], shape)
            scale = threads.select(yes, scales[loads + i], nothing).real() if scales else 1.0
            for query, weight in zip(out, scores[i], strict=True):
                weight = weight * scale if scales else weight
                query[2:] = [
                    each.times_plus(weight, so_far) for each, so_far in zip(v, query[2:], strict=True)
                ]
        return threads.as_array([each for query in out for each in query])

    return run(state, q, entries, step, split, *limits)


def _entry(words: list[Word], shape: HeadShape) -> list[Real]:
    """Return a thread's features of a key or value; for int8, as whole numbers."""
    if shape.quantized:
        return [each for word in words for each in threads.signed_bytes(word)]
    return threads.eight_reals(words)
