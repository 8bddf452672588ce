"""Loads entries of the cache into the threads that attend to them (Mosaic GPU)."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.decode_attention.gpu_heads import BYTES, HeadShape, KeyLane
from twla_jax.ops.hopper import threads

_SPLAT = plgpu.Layout.WG_SPLAT


def fetch(cache, step, split, limits=(), *, shape: HeadShape) -> jax.Array:
    """Start the loads of a warp's next keys and values into its threads, and return their words.

    Args:
      cache: keys and values, and the scales of both if they are int8.
      step: number of the step.
      split: which split of the positions this block reads.
      limits: from which position on and before which; none means all that there is room for.
      shape: how the heads are split up.
    """
    room = cache[0].shape[0]

    @threads.on_threads(
        arg_types=(*[_SPLAT] * (2 + len(limits)), *[plgpu.RefType()] * len(cache)),
        return_type=threads.values(shape.words, jnp.int32),
    )
    def load(_, *operands):
        step, split, *ends = map(threads.splat_word, operands[: 2 + len(limits)])
        me, found = KeyLane(shape, split), []
        positions = [me.position(step, i) for i in range(shape.config.loads)]
        if ends:
            there = [threads.both(each >= ends[0], each < ends[1]) for each in positions]
        else:
            there = [each < room for each in positions]
        for i, ref in enumerate(operands[2 + len(limits) :]):
            for position, condition in zip(positions, there, strict=True):
                offset, count = position * 4, 1
                if i < 2:
                    offset, count = (position * shape.d + me.feature) * (BYTES // shape.count), BYTES // 4
                found += threads.load_global(ref, offset, count, condition=condition)
        return threads.as_array(found)

    return load(step, split, *limits, *cache)


def first_scales(scales, split, *, shape: HeadShape) -> jax.Array:
    """Return only the scales of the step that `fetch` loads first."""
    room = scales[0].shape[0]

    @threads.on_threads(
        arg_types=(_SPLAT, *[plgpu.RefType()] * len(scales)),
        return_type=threads.values(2 * shape.config.loads, jnp.int32),
    )
    def load(_, split, *refs):
        me, found = KeyLane(shape, threads.splat_word(split)), []
        positions = [me.position(threads.word(0), i) for i in range(shape.config.loads)]
        for ref in refs:
            for each in positions:
                found += threads.load_global(ref, each * 4, condition=each < room)
        return threads.as_array(found)

    return load(split, *scales)


def from_shared(entries, scales, split, *, shape: HeadShape) -> jax.Array:
    """Return the words of the first step, as `fetch` does, from entries that the copy engine brought.

    Args:
      entries: keys and values of a warpgroup's warps, in shared memory.
      scales: from `first_scales`, in a list that is empty if there are none.
      split: which split of the positions this block reads.
      shape: how the heads are split up.
    """

    @threads.on_threads(
        arg_types=(
            _SPLAT,
            *[threads.per_thread(each.shape[0] // 128) for each in scales],
            *[plgpu.RefType()] * 2,
        ),
        return_type=threads.values(shape.words, jnp.int32),
    )
    def load(_, split, *operands):
        *scales, keys, values = operands
        me, found, size = KeyLane(shape, threads.splat_word(split)), [], BYTES * shape.lanes
        for ref in (keys, values):
            at = threads.address(ref) + ((me.warp & 3) * shape.chunk + me.row) * size
            at = at + me.feature * (BYTES // shape.count)
            for i in range(shape.config.loads):
                found += threads.load(at, BYTES // 4, offset=i * shape.rows * size)
        return threads.as_array(found + [each for of in scales for each in threads.words(of)])

    return load(split, *scales, *entries)
