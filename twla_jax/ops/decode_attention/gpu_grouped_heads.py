"""Rotates the heads of a group to their position, a warp a head, and leaves them in shared memory (Mosaic GPU)."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.decode_attention.gpu_grouped_shape import GroupShape, MatrixLane
from twla_jax.ops.decode_attention.gpu_lanes import score_factor
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Real, Word

MARGIN = 4  # words after a head: a factor, and room, so that a head begins where 16 bytes do
_SPLAT = plgpu.Layout.WG_SPLAT
_EXPONENT = 0x7F800000


def fetch_heads(
    qkv_gmem, angles, norm_scales, first_head, kv_head, *, shape: GroupShape
) -> tuple[jax.Array, ...]:
    """Start the loads of a warp's heads, and of what `rotate_group` needs besides.

    Args:
      qkv_gmem: heads of a sequence.
      angles: the cosines and the sines.
      norm_scales: weights of the norms of queries and keys, or nothing.
      first_head: the first query's head.
      kv_head: head of the key and of the value.
      shape: how the heads are split up.

    Returns:
      The heads, the cosines and the sines, and the norm scales if there are any.
    """
    refs, queries, d = [qkv_gmem, *angles, *norm_scales], shape.config.queries, shape.d
    counts = [d // threads.WARP * len(_numbers(shape)), d // threads.WARP]
    counts += [2 * d // threads.WARP] * bool(norm_scales)

    @threads.on_threads(
        arg_types=(*[_SPLAT] * 2, *[plgpu.RefType()] * len(refs)),
        return_type=tuple(threads.values(count, jnp.float32) for count in counts),
    )
    def run(_, first_head, kv_head, qkv, cos, sin, *scales):
        first_head, kv_head = map(threads.splat_word, (first_head, kv_head))
        me, heads = MatrixLane(shape), []
        features = _features(me, shape)
        for number in _numbers(shape):
            kind = (me.warp + number).least(queries + 1)
            of_kv = kind * shape.kv_heads + (kv_head + (shape.heads - queries * shape.kv_heads))
            row = threads.select(kind < queries, first_head + kind, of_kv)
            heads += [threads.load_real(qkv, row * d + each) for each in features]
        half = features[: len(features) // 2]
        found = [heads, [threads.load_real(ref, each) for ref in (cos, sin) for each in half]]
        if scales:
            found.append([threads.load_real(ref, each) for ref in scales for each in features])
        return tuple(map(threads.as_array, found))

    return run(first_head, kv_head, *refs)


def _numbers(shape: GroupShape) -> range:
    """Return the first of the heads that a warp has of each round, less the warp's number."""
    return range(0, shape.config.queries + 2, shape.config.warps)


def _features(me: MatrixLane, shape: GroupShape) -> list[Word]:
    """Return a lane's features, those that are rotated together half of them apart."""
    return [me.lane + i for i in range(0, shape.d, threads.WARP)]


def rotate_group(found, heads_smem, *, shape: GroupShape, epsilon: float) -> None:
    """Write the group's queries, its key and its value to shared memory, in float32, and wait for the group.

    Queries and the key are normalised if there are norm scales, and rotated. Queries are divided by powers of two, so
    that they fit fp16, and their scores' factors come after them. If the cache is int8, key and value are whole
    numbers, and their scales come after them.

    Args:
      found: from `fetch_heads`.
      heads_smem: `[queries + 2, d + MARGIN]`.
      shape: how the heads are split up.
      epsilon: added to the mean square in the norm.
    """
    queries, d, count = shape.config.queries, shape.d, shape.d // threads.WARP

    @threads.on_threads(
        arg_types=(*[threads.per_thread(each.shape[0] // 128) for each in found], plgpu.RefType())
    )
    def run(_, heads, angles, *rest):
        *scales, out = rest
        me, to = MatrixLane(shape), threads.address(out)
        features, heads, angles = _features(me, shape), threads.reals(heads), threads.reals(angles)
        cosines, sines = angles[: count // 2], angles[count // 2 :]
        scales = [threads.reals(scales[0])[i : i + count] for i in (0, count)] if scales else []
        numbers = [me.warp + i for i in _numbers(shape)]
        vectors = [heads[i : i + count] for i in range(0, len(heads), count)]
        for number, vector in zip(numbers, vectors, strict=True):
            is_query, is_value = number < queries, number >= queries + 1
            turned = vector
            if scales:
                factor = threads.reciprocal_root(
                    _over_warp(_squares(vector), Real.__add__) * (1 / d) + epsilon
                )
                chosen = [threads.select(is_query, *pair) for pair in zip(*scales, strict=True)]
                # Round in between, as the reference does.
                turned = [
                    (each * factor * scale).to_bfloat16() for each, scale in zip(vector, chosen, strict=True)
                ]
            turned = _rotated(turned, cosines, sines)
            vector = [threads.select(is_value, *pair) for pair in zip(vector, turned, strict=True)]
            largest = functools.reduce(Real.most, [each.most(threads.real(0.0) - each) for each in vector])
            largest = _over_warp(largest, Real.most)
            power = largest.word() & _EXPONENT
            inverse = (threads.word(254 << 23) - power).real()
            query = [each * inverse for each in vector]
            last = power.real() * score_factor(shape)
            if shape.quantized:
                scale = largest.most(1e-8) / 127.0
                vector = _whole(vector, threads.real(1.0) / scale)
                last = threads.select(is_query, last, scale)
            vector = [threads.select(is_query, *pair) for pair in zip(query, vector, strict=True)]
            with threads.when(number < queries + 2):
                at = place_of_head(to, number, shape)
                for feature, each in zip(features, vector, strict=True):
                    threads.store(at + feature * 4, each)
                with threads.when(me.lane.equals(0)):
                    threads.store(at, last, offset=4 * d)
        me.barrier()

    run(*found, heads_smem)


def place_of_head(at: Word, number: Word, shape: GroupShape) -> Word:
    """Return where a head begins in shared memory."""
    return at + number * (4 * (shape.d + MARGIN))


def _squares(vector: list[Real]) -> Real:
    return functools.reduce(Real.__add__, [each * each for each in vector])


def _rotated(vector: list[Real], cosines: list[Real], sines: list[Real]) -> list[Real]:
    parts = [vector[: len(cosines)], vector[len(cosines) :], cosines, sines]
    first = [x * c - y * s for x, y, c, s in zip(*parts, strict=True)]
    second = [y * c + x * s for x, y, c, s in zip(*parts, strict=True)]
    return [each.to_bfloat16() for each in first + second]


def _whole(vector: list[Real], inverse: Real) -> list[Real]:
    # Adding a number as large as WHOLE rounds to a whole number.
    return [each.times_plus(inverse, threads.WHOLE) - threads.WHOLE for each in vector]


def _over_warp(value: Real, combine) -> Real:
    for i in range(5):
        value = combine(value, threads.shuffle(value, 1 << i))
    return value


def load_queries(heads_smem, *, shape: GroupShape):
    """Return a thread's part of the queries as columns of products, and the factors of the scores of its two."""

    @threads.on_threads(
        arg_types=(plgpu.RefType(),),
        return_type=(threads.values(shape.d // 8, jnp.int32), threads.values(2, jnp.float32)),
    )
    def load(_, heads):
        me, at, last = MatrixLane(shape), threads.address(heads), shape.config.queries - 1
        pack = threads.pack_float16 if shape.quantized else threads.pack_bfloat16
        of_query, found = place_of_head(at, me.row.least(last), shape), []
        for j in range(shape.d // 16):
            words = threads.load(of_query + me.key_feature(j) * 4, 4)
            numbers = [each.real() for each in words]
            found += [pack(*numbers[:2]), pack(*numbers[2:])]
        factors = [
            threads.load(place_of_head(at, (me.column * 2 + i).least(last), shape), offset=4 * shape.d)[0]
            for i in range(2)
        ]
        return threads.as_array(found), threads.as_array([each.real() for each in factors])

    return load(heads_smem)


def write_entry(heads_smem, cache, first_head, split, length, *, shape: GroupShape) -> None:
    """Write the key and the value into the cache, a warp each, by the first of the blocks that share them."""

    @threads.on_threads(arg_types=(*[_SPLAT] * 3, plgpu.RefType(), *[plgpu.RefType()] * len(cache)))
    def run(_, first_head, split, length, heads, *refs):
        me, length = MatrixLane(shape), threads.splat_word(length)
        of_kv_head = threads.splat_word(first_head) % (shape.heads // shape.kv_heads)
        for kind, ref in enumerate(refs[:2]):
            at = place_of_head(threads.address(heads), threads.word(shape.config.queries + kind), shape)
            first = threads.both(of_kv_head.equals(0), threads.splat_word(split).equals(0))
            mine = threads.both(first, me.warp.equals(kind))
            for first in range(0, shape.d, 4 * threads.WARP):
                feature = me.lane * 4 + first
                with threads.when(threads.both(mine, feature < shape.d)):
                    numbers = [each.real() for each in threads.load(at + feature * 4, 4)]
                    if shape.quantized:
                        packed = [threads.pack_bytes(numbers)]
                    else:
                        packed = [threads.pack_bfloat16(*numbers[i : i + 2]) for i in (0, 2)]
                    threads.store_global_words(ref, (length * shape.d + feature) * shape.size, packed)
            if shape.quantized:
                with threads.when(threads.both(mine, me.lane.equals(0))):
                    scale = threads.load(at, offset=4 * shape.d)[0].real()
                    threads.store_real(refs[2 + kind], length, scale)

    run(first_head, split, length, heads_smem, *cache)
