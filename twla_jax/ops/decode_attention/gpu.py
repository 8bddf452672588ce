"""Attention of one new token in one kernel on Hopper GPUs (Pallas Mosaic GPU), bound by the cache's way from memory.

Thread by thread: so few queries meet a key that tensor cores, and what has to be waited for around them, bring nothing.
A warp reads some positions of a key head at once, 16 bytes of a key or value a thread, on their way before the queries
are there. The warps of a block, and the blocks of a cluster, share the positions; each has a softmax of its own, which
meet in shared memory. The new token's own key and value never pass through the cache: the first warp begins with them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxtyping import Array, BFloat16, Float, Int32

from twla_jax.models.attention import Positions
from twla_jax.models.kv_cache import LayerKV
from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.decode_attention import tiles as tuning
from twla_jax.ops.decode_attention.tiles import LOADS
from twla_jax.ops.gpu_threads import Real, Word

_LOWEST = -1e30  # in place of −∞, whose difference from itself is no number
_COUNT = 8  # features of a thread


def obstacle(qkv: jax.Array, layer: LayerKV) -> str | None:
    """Why the kernel cannot take such operands, or None."""
    d = layer.entries.shape[-1]
    if qkv.dtype != jnp.bfloat16 or layer.entries.dtype != jnp.bfloat16:
        return f"queries are {qkv.dtype} and the cache is {layer.entries.dtype}, not bfloat16"
    return f"heads have {d} features, not 64, 128 or 256" if d not in (64, 128, 256) else None


def decode_attention(
    qkv: BFloat16[Array, "b all_heads d"],
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    *,
    epsilon: float = 0.0,
    tiles: tuning.Tiles | None = None,
) -> tuple[BFloat16[Array, "b heads_d"], LayerKV]:
    """What `reference.decode_attention` computes, in bf16."""
    b, all_heads, d = qkv.shape
    _, _, kv_heads, size, _ = layer.entries.shape
    heads = all_heads - 2 * kv_heads
    tiles = tiles or tuning.tiles(b * heads, heads // kv_heads, size, d)
    each, splits = tiles.queries, tiles.splits
    shape = _Shape(d=d, heads=heads, kv_heads=kv_heads, tiles=tiles)
    cluster = {"cluster": (splits,), "cluster_names": ("split",)} if splits > 1 else {}
    scratch = {"parts_smem": plgpu.SMEM((tiles.warps + 1, each, d + 2), jnp.float32)}
    body = functools.partial(_kernel, shape=shape, epsilon=epsilon)
    kernel: Any = pl.kernel(
        lambda *refs: pl.run_scoped(functools.partial(body, *refs), collective_axes="warpgroup", **scratch),
        out_type=(jax.ShapeDtypeStruct((b, heads, d), jnp.bfloat16),),
        mesh=plgpu.Mesh(
            grid=(b * heads // each,),
            grid_names=("head",),
            num_threads=tiles.warps // 4,
            thread_name="warpgroup",
            **cluster,
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="decode_attention",
    )
    entries = jax.new_ref(layer.entries)
    (mixed,) = kernel(
        entries,
        qkv,
        positions.cos[0],
        positions.sin[0],
        positions.query[:1],
        window.reshape(1),
        *map(threads.readable, norm_scales or ()),
    )
    return mixed.reshape(b, heads * d), LayerKV(entries=jax.freeze(entries))


class _Shape:
    """Features and heads, and how they are split up."""

    def __init__(self, *, d: int, heads: int, kv_heads: int, tiles: tuning.Tiles):
        self.d, self.heads, self.kv_heads = d, heads, kv_heads
        self.queries, self.warps, self.splits = tiles.queries, tiles.warps, tiles.splits
        self.workers = self.warps * self.splits
        self.lanes = d // _COUNT  # that share a position
        self.rows = threads.WARP // self.lanes  # positions that are read at once
        self.chunk = LOADS * self.rows  # positions under way


def _kernel(
    entries_gmem,
    qkv_gmem,
    cos_gmem,
    sin_gmem,
    length_gmem,
    window_gmem,
    *refs,
    parts_smem,
    shape: _Shape,
    epsilon: float,
):
    *norm_scales, out_gmem = refs
    of_sequence = shape.heads // shape.queries
    sequence, first_head = (op(lax.axis_index("head"), jnp.int32(of_sequence)) for op in (lax.div, lax.rem))
    first_head *= shape.queries
    kv_head = lax.div(first_head, jnp.int32(shape.heads // shape.kv_heads))
    split = lax.axis_index("split") if shape.splits > 1 else jnp.int32(0)
    length = length_gmem[0]
    start = jnp.maximum(length + 1 - window_gmem[0], 0)
    first = lax.div(start, shape.chunk)
    workers = shape.workers
    steps = jnp.maximum(
        lax.div(lax.div(length + shape.chunk - 1, shape.chunk) - first + workers - 1, workers), 0
    )
    k_gmem, v_gmem = (entries_gmem.at[i, sequence, kv_head] for i in range(2))
    place = (split, first, start, length)

    def fetch(step):
        return _fetch(k_gmem, v_gmem, step, *place, shape=shape)

    entries = fetch(jnp.int32(0))
    q, k, v = _turn(
        [qkv_gmem.at[sequence, first_head + i] for i in range(shape.queries)],
        [qkv_gmem.at[sequence, row + kv_head] for row in (shape.heads, shape.heads + shape.kv_heads)],
        cos_gmem,
        sin_gmem,
        norm_scales,
        shape=shape,
        epsilon=epsilon,
    )
    _write(k, v, k_gmem, v_gmem, first_head, *place, shape=shape)

    def step(i, carry):
        state, entries = carry
        state = _attend(state, q, entries, i, *place, shape=shape)
        return state, fetch(i + 1)

    state, _ = lax.fori_loop(0, steps, step, (_begin(q, k, v, split, shape=shape), entries))
    _finish(state, parts_smem, out_gmem.at[sequence], first_head, split, shape=shape)


class _Lane:
    """A thread's place: the first of its features, and which of the positions read at once it has."""

    def __init__(self, shape: _Shape, split: Word):
        me = threads.thread()
        self.warp, lane = me // threads.WARP, me & (threads.WARP - 1)
        self.row, self.feature = lane // shape.lanes, (lane & (shape.lanes - 1)) * _COUNT
        self.lane = lane
        self.worker = split * shape.warps + self.warp
        self.shape = shape

    def position(self, step: Word, first: Word, i: int) -> Word:
        """Of load i of a step."""
        shape = self.shape
        chunk = first + step * shape.workers + self.worker
        return chunk * shape.chunk + (self.row + i * shape.rows)

    def over_features(self, value: Real) -> Real:
        """The sum over the threads of a position."""
        for i in range(self.shape.lanes.bit_length() - 1):
            value = value + threads.shuffle(value, 1 << i)
        return value

    def over_rows(self, value: Real, combine) -> Real:
        """All positions' values combined."""
        for i in range(self.shape.rows.bit_length() - 1):
            value = combine(value, threads.shuffle(value, self.shape.lanes << i))
        return value


_SPLAT = plgpu.Layout.WG_SPLAT


def _fetch(k_gmem, v_gmem, step, split, first, start, length, *, shape: _Shape) -> jax.Array:
    """Starts the way of a warp's next keys and values to its threads."""
    count = 2 * LOADS * _COUNT // 2

    @threads.on_threads(
        arg_types=(*[_SPLAT] * 5, plgpu.RefType(), plgpu.RefType()),
        return_type=threads.values(count, jnp.int32),
    )
    def load(_, step, split, first, start, length, *refs):
        step, split, first, start, length = map(threads.splat_word, (step, split, first, start, length))
        me, found = _Lane(shape, split), []
        for ref in refs:
            for i in range(LOADS):
                position = me.position(step, first, i)
                seen = threads.both(position >= start, position < length)
                offset = (position * shape.d + me.feature) * 2
                found += threads.load_global(ref, offset, 4, condition=seen)
        return threads.as_array(found)

    return load(step, split, first, start, length, k_gmem, v_gmem)


def _turn(q_gmem, kv_gmem, cos_gmem, sin_gmem, norm_scales, *, shape: _Shape, epsilon: float):
    """A thread's features of queries, normed and turned to their position, of the key likewise, and of the value."""
    count = shape.queries
    refs = [*q_gmem, *kv_gmem, cos_gmem, sin_gmem, *norm_scales]

    @threads.on_threads(
        arg_types=(plgpu.RefType(),) * len(refs),
        return_type=(
            threads.values(count * _COUNT, jnp.float32),
            threads.values(_COUNT, jnp.float32),
            threads.values(_COUNT, jnp.float32),
        ),
    )
    def turn(_, *refs):
        me, half = _Lane(shape, threads.word(0)), shape.d // 2
        of_half = threads.select(me.feature >= half, me.feature - half, me.feature)
        vectors = [_load(ref, me.feature) for ref in refs[: count + 2]]
        cos, sin = (_load(ref, of_half) for ref in refs[count + 2 : count + 4])
        scales = [_load(ref, me.feature) for ref in refs[count + 4 :]]
        # The first half of the features is turned against the second, and the second towards the first.
        sign = threads.select(me.feature >= half, threads.real(1.0), threads.real(-1.0))
        turned = []
        for i, vector in enumerate(vectors[:-1]):
            if scales:
                squares = functools.reduce(Real.__add__, [each * each for each in vector])
                factor = threads.reciprocal_root(me.over_features(squares) * (1 / shape.d) + epsilon)
                scale = scales[i == count]
                # Rounded in between, as the reference does.
                vector = [(each * factor * s).to_bfloat16() for each, s in zip(vector, scale, strict=True)]
            others = [threads.shuffle(each, shape.lanes // 2) for each in vector]
            turned.append(
                [
                    (each * c + other * (s * sign)).to_bfloat16()
                    for each, other, c, s in zip(vector, others, cos, sin, strict=True)
                ]
            )
        q = [each for vector in turned[:count] for each in vector]
        return threads.as_array(q), threads.as_array(turned[count]), threads.as_array(vectors[-1])

    return turn(*refs)


def _load(ref: ir.Value, index: Word) -> list[Real]:
    """Eight numbers from an index on, of float32 or bf16."""
    size = threads.bits(ref) // 8
    parts = [threads.load_global(ref, index * size + 16 * i, 4) for i in range(size // 2)]
    return threads.eight_reals([word for part in parts for word in part])


def _reals(array) -> list[list[Real]]:
    """Eights of what `as_array` was given."""
    values = threads.reals(array)
    return [values[i : i + _COUNT] for i in range(0, len(values), _COUNT)]


def _write(k, v, k_gmem, v_gmem, first_head, split, first, start, length, *, shape: _Shape) -> None:
    """The key and the value into the cache, by the first of the warps that have a share of their head."""
    eight = threads.per_thread(_COUNT)
    del first, start

    @threads.on_threads(arg_types=(eight, eight, *[_SPLAT] * 3, plgpu.RefType(), plgpu.RefType()))
    def write(_, k, v, first_head, split, length, *refs):
        me, length = _Lane(shape, threads.splat_word(split)), threads.splat_word(length)
        of_kv_head = threads.splat_word(first_head) % (shape.heads // shape.kv_heads)
        mine = threads.both(me.worker.equals(0), of_kv_head.equals(0), me.row.equals(0))
        with threads.when(mine):
            for ref, vector in zip(refs, (k, v), strict=True):
                (values,) = _reals(vector)
                pairs = [threads.pack_bfloat16(*values[i : i + 2]) for i in range(0, _COUNT, 2)]
                threads.store_global_words(ref, (length * shape.d + me.feature) * 2, pairs)

    write(k, v, first_head, split, length, k_gmem, v_gmem)


def _begin(q, k, v, split, *, shape: _Shape) -> jax.Array:
    """For each query, the largest score so far, the sum, and the mix of values: of the new token, or of nothing."""
    eight = threads.per_thread(_COUNT)
    count = shape.queries * (2 + _COUNT)

    @threads.on_threads(
        arg_types=(threads.per_thread(shape.queries * _COUNT), eight, eight, _SPLAT),
        return_type=threads.values(count, jnp.float32),
    )
    def begin(_, q, k, v, split):
        me = _Lane(shape, threads.splat_word(split))
        (k,), (v,) = _reals(k), _reals(v)
        mine = me.worker.equals(0)
        # Sums go over the positions that are read at once; the new one's counts once.
        once = threads.both(mine, me.row.equals(0))
        zero, out = threads.real(0.0), []
        for query in _reals(q):
            score = me.over_features(_dot(query, k)) * _factor(shape)
            out += [
                threads.select(mine, score, threads.real(_LOWEST)),
                threads.select(once, threads.real(1.0), zero),
                *[threads.select(once, each, zero) for each in v],
            ]
        return threads.as_array(out)

    return begin(q, k, v, split)


def _factor(shape: _Shape) -> float:
    return shape.d**-0.5 * math.log2(math.e)


def _dot(a: list[Real], b: list[Real]) -> Real:
    total = a[0] * b[0]
    for one, other in zip(a[1:], b[1:], strict=True):
        total = one.times_plus(other, total)
    return total


def _attend(state, q, entries, step, split, first, start, length, *, shape: _Shape) -> jax.Array:
    """The state with the positions of a step."""
    counts = [each.shape[0] // 128 for each in (state, q, entries)]

    @threads.on_threads(
        arg_types=(*[threads.per_thread(n) for n in counts], *[_SPLAT] * 5),
        return_type=threads.values(counts[0], jnp.float32),
    )
    def attend(_, state, q, entries, step, split, first, start, length):
        step, split, first, start, length = map(threads.splat_word, (step, split, first, start, length))
        me = _Lane(shape, split)
        words = threads.words(entries)
        fours = [words[i : i + 4] for i in range(0, len(words), 4)]
        keys, values = fours[:LOADS], fours[LOADS:]
        positions = [me.position(step, first, i) for i in range(LOADS)]
        seen = [threads.both(each >= start, each < length) for each in positions]
        before = threads.reals(state)
        out = []
        queries, scores = _reals(q), []
        for key, yes in zip(keys, seen, strict=True):
            k = threads.eight_reals(key)
            row = [me.over_features(_dot(query, k)) * _factor(shape) for query in queries]
            scores.append([threads.select(yes, score, threads.real(_LOWEST)) for score in row])
        for j in range(shape.queries):
            top, total, *mixed = before[j * (2 + _COUNT) : (j + 1) * (2 + _COUNT)]
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
        for value, row in zip(values, scores, strict=True):
            v = threads.eight_reals(value)
            for query, weight in zip(out, row, strict=True):
                query[2:] = [
                    each.times_plus(weight, so_far) for each, so_far in zip(v, query[2:], strict=True)
                ]
        return threads.as_array([each for query in out for each in query])

    return attend(state, q, entries, step, split, first, start, length)


def _finish(state, parts_smem, out_gmem, first_head, split, *, shape: _Shape) -> None:
    """The mix of all warps' and blocks' parts, each weighed by its share of the sum of the softmax."""
    count, block = state.shape[0] // 128, shape.warps * threads.WARP
    width, outputs = shape.d + 2, shape.queries * shape.d

    @threads.on_threads(
        arg_types=(threads.per_thread(count), _SPLAT, _SPLAT, plgpu.RefType(), plgpu.RefType())
    )
    def write(_, state, first_head, split, parts, out):
        split = threads.splat_word(split)
        me, at = _Lane(shape, split), threads.address(parts)
        values = threads.reals(state)
        for j in range(shape.queries):
            top, *sums = values[j * (2 + _COUNT) : (j + 1) * (2 + _COUNT)]
            sums = [me.over_rows(each, Real.__add__) for each in sums]
            to = at + (me.warp * shape.queries + j) * (4 * width)
            with threads.when(me.row.equals(0)):
                for i, each in enumerate(sums[1:]):
                    threads.store(to + me.feature * 4, each, offset=8 + 4 * i)
            with threads.when(me.lane.equals(0)):
                threads.store(to, top)
                threads.store(to, sums[0], offset=4)
        threads.barrier(block)

        def place(index: Word, of: Word | int) -> tuple[Word, Word]:
            """Where a part's largest score and sum are for an output, and where its number is."""
            to = at + (threads.word(0) + of) * (4 * width * shape.queries)
            to = to + (index // shape.d) * (4 * width)
            return to, to + (index % shape.d) * 4 + 8

        def combine(parts: list[tuple[Real, Real, Real]]) -> tuple[Real, Real, Real]:
            top = functools.reduce(Real.most, [part[0] for part in parts])
            shares = [threads.power_of_two(part[0] - top) for part in parts]
            total, mixed = (_dot([part[i] for part in parts], shares) for i in (1, 2))
            return top, total, mixed

        def each_output(limit: int, act) -> None:
            for i in range(-(-limit // block)):
                index = threads.thread() + i * block
                with threads.when(index < limit):
                    act(index)

        def of_warps(index: Word) -> tuple[Real, Real, Real]:
            found = []
            for warp in range(shape.warps):
                of_query, number = place(index, warp)
                found.append(
                    (
                        *[threads.load(of_query, offset=4 * i)[0].real() for i in range(2)],
                        threads.load(number)[0].real(),
                    )
                )
            return combine(found)

        def store_output(index: Word, result: tuple[Real, Real, Real]) -> None:
            _, total, mixed = result
            threads.store_real(out, threads.splat_word(first_head) * shape.d + index, mixed / total)

        if shape.splits == 1:
            each_output(outputs, lambda index: store_output(index, of_warps(index)))
            return

        def keep(index: Word) -> None:
            top, total, mixed = of_warps(index)
            of_query, number = place(index, shape.warps)
            threads.store(number, mixed)
            with threads.when((index % shape.d).equals(0)):
                threads.store(of_query, top)
                threads.store(of_query, total, offset=4)

        each_output(outputs, keep)
        threads.cluster_barrier()

        def of_blocks(index: Word) -> None:
            index = split * (outputs // shape.splits) + index
            of_query, number = place(index, shape.warps)
            found = []
            for block in range(shape.splits):
                there = [threads.address_of_block(each, block) for each in (of_query, of_query + 4, number)]
                found.append(tuple(threads.load_of_block(each) for each in there))
            store_output(index, combine(found))

        each_output(outputs // shape.splits, of_blocks)
        threads.cluster_barrier()  # no block may end while another reads

    write(state, first_head, split, parts_smem, out_gmem)
