"""Passes queries, keys and values through global memory from the blocks that compute them (Mosaic GPU)."""

from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.decode_attention.gpu_heads import HeadShape
from twla_jax.ops.hopper import threads

VECTORS = 3  # a query, a key and a value


def receive(exchange_gmem, tag, head, kv_head, vectors_smem, *, shape: HeadShape) -> None:
    """Wait for a head's query and its key head's key and value, and store them in `vectors_smem`."""
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
            found = threads.receive(exchange, [(row * shape.d + (me % fours) * 4) * 4], tag)
            low = [each & 0xFFFF for each in found]
            packed = [low[i] + (low[i + 1] << 16) for i in (0, 2)]
            threads.store(threads.address(vectors) + me * 8, *packed)
        threads.barrier(32 * shape.config.warps)

    run(tag, head, kv_head, exchange_gmem, vectors_smem)
