"""Tags of numbers that blocks of a kernel pass on to each other through memory (Mosaic GPU).

A number goes with a tag in one word, which is written and read at once: whoever finds the tag has the number, and there
is nothing else to wait for. All words of an exchange have one tag before a launch, and the next one after it.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.hopper import threads as threads


def next_tag(exchange_gmem, place) -> jax.Array:
    """This launch's, in the upper half of a word, after that of the word at `place`.

    It is to be a word that this block itself sends, and only after this.
    """

    @threads.on_threads(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=threads.values(1, jnp.int32)
    )
    def load(_, exchange, place):
        (before,) = threads.load_global(exchange, threads.splat_word(place) * 4)
        return threads.as_array([(before & 0xFFFF0000) + 0x10000])

    return load(exchange_gmem, place)


def keep_tag(exchange_gmem, place, tag) -> None:
    """Writes this launch's tag to a word that nobody waits for, when all threads of the block have read it."""

    @threads.on_threads(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, threads.per_thread(1)))
    def store(_, exchange, place, tag):
        with threads.when(threads.thread().equals(0)):
            threads.send(exchange, threads.splat_word(place) * 4, threads.words(tag)[0])

    store(exchange_gmem, place, tag)
