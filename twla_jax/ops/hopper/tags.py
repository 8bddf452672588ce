"""Tags numbers that blocks of a kernel pass to each other through global memory (Mosaic GPU).

A number and its tag are one word, which is written and read at once: a thread that finds the tag has the number, and
needs to wait for nothing else. All words of an exchange have one tag before a launch, and the next one after it.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.hopper import threads


def next_tag(exchange_gmem, place) -> jax.Array:
    """Return the tag of this launch: one more than that stored at `place`, in the upper 16 bits.

    `place` must be a word that this block itself sends, and only after this call.
    """

    @threads.on_threads(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=threads.values(1, jnp.int32)
    )
    def load(_, exchange, place):
        (before,) = threads.load_global(exchange, threads.splat_word(place) * 4)
        return threads.as_array([(before & 0xFFFF0000) + 0x10000])

    return load(exchange_gmem, place)


def keep_tag(exchange_gmem, place, tag) -> None:
    """Write this launch's tag to a word that no block waits for, once all threads of the block have read it."""

    @threads.on_threads(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, threads.per_thread(1)))
    def store(_, exchange, place, tag):
        with threads.when(threads.thread().equals(0)):
            threads.send(exchange, threads.splat_word(place) * 4, threads.words(tag)[0])

    store(exchange_gmem, place, tag)
