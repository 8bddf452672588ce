"""Queries, keys and values from the blocks that make them to those that need them, through memory (Mosaic GPU).

A number goes with a tag in one word, which is written and read at once: whoever finds the tag has the number, and there
is nothing else to wait for. All words of an exchange have one tag before a launch, and the next one after it.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.decode_attention.gpu_lanes import Shape

VECTORS = 3  # a query, a key and a value


def next_tag(exchange_gmem, first_row) -> jax.Array:
    """This launch's, in the upper half of a word. Before the block sends anything."""

    @threads.on_threads(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=threads.values(1, jnp.int32)
    )
    def load(_, exchange, first_row):
        (before,) = threads.load_global(exchange, threads.splat_word(first_row) * 4)
        return threads.as_array([(before & 0xFFFF0000) + 0x10000])

    return load(exchange_gmem, first_row)


def receive(exchange_gmem, tag, head, kv_head, vectors_smem, *, shape: Shape) -> None:
    """A head's query, and its key head's key and value, to `vectors_smem`; waits for the block."""
    fours = shape.d // 4

    @threads.on_threads(
        arg_types=(
            threads.per_thread(1),
            *[plgpu.Layout.WG_SPLAT] * 2,
            *[plgpu.RefType()] * 2,
        )
    )
    def run(_, tag, head, kv_head, exchange, vectors):
        (tag,), me = threads.words(tag), threads.thread()
        head, kv_head = threads.splat_word(head), threads.splat_word(kv_head)
        with threads.when(me < VECTORS * fours):
            vector = me // fours
            of_key = kv_head + shape.heads
            row = threads.select(vector.equals(0), head, of_key)
            row = threads.select(vector.equals(2), of_key + shape.kv_heads, row)
            found = threads.receive(exchange, (row * shape.d + (me % fours) * 4) * 4, tag)
            low = [each & 0xFFFF for each in found]
            packed = [low[i] + (low[i + 1] << 16) for i in (0, 2)]
            threads.store(threads.address(vectors) + me * 8, *packed)
        threads.barrier(32 * shape.tiles.warps)

    run(tag, head, kv_head, exchange_gmem, vectors_smem)
