"""Copies entries of the cache into shared memory, each lane those that it will read itself (Mosaic GPU).

Registers would not do: the compiler starts loads into them late, to have more of them until then.
"""

from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.decode_attention.gpu_grouped_shape import CHUNK, PIECE, SLOTS, GroupShape, MatrixLane
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Word

_SPLAT = plgpu.Layout.WG_SPLAT


def start_copies(cache, ring_smem, slot, step, least, most, there, *, shape: GroupShape) -> None:
    """Start the copies of a step's entries into a slot of the warp's ring: what its lanes will read, lane by lane.

    Args:
      cache: keys and values, and the scales of both if they are int8.
      ring_smem: slots of all warps.
      slot: number of the slot.
      step: number of the step.
      least: the first position that there is; a thread reads it instead of those before it.
      most: the last position that there is, likewise.
      there: 1 if there is such a step, else 0.
      shape: how the heads are split up.
    """

    @threads.on_threads(arg_types=(*[_SPLAT] * 5, *[plgpu.RefType()] * (1 + len(cache))))
    def run(_, slot, step, least, most, there, ring, keys, values, *scales):
        slot, step, least, most, there = map(threads.splat_word, (slot, step, least, most, there))
        me, whole = MatrixLane(shape), shape.d * shape.size
        to = me.slot(threads.address(ring), slot)

        def within(position: Word) -> Word:
            return threads.select(position < least, least, position).least(most)

        with threads.when(there.equals(1)):
            size = PIECE
            for position in me.keys(step):
                at = within(position) * whole + me.column * size
                for piece in range(0, whole, 4 * size):
                    threads.copy(to + me.lane * size, keys, at + piece, size // 4)
                    to = to + threads.WARP * size
            size = min(PIECE, whole // 8)
            for position in me.values(step):
                at = within(position) * whole + me.row * size
                for piece in range(0, whole, 8 * size):
                    threads.copy(to + me.lane * size, values, at + piece, size // 4)
                    to = to + threads.WARP * size
            for i, ref in enumerate(scales):
                at = within(me.first(step) + (me.lane & (CHUNK - 1))) * 4
                with threads.when((me.lane // CHUNK).equals(i)):
                    threads.copy(to + me.lane * 4, ref, at)

    run(slot, step, least, most, there, ring_smem, *cache)


def end_copies() -> None:
    """End a batch of copies."""
    threads.on_threads()(lambda _: threads.end_copies())()


def wait_for_copies() -> None:
    """Wait for the oldest batch of copies: all but one less than there are slots."""
    threads.on_threads()(lambda _: threads.wait_for_copies(SLOTS - 1))()
