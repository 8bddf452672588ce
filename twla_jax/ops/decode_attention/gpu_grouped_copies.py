"""Copies entries of the cache into shared memory, a warp those that it will read itself (Mosaic GPU).

Registers would not do: the compiler starts loads into them late, to have more of them until then.
"""

from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.decode_attention.gpu_grouped_shape import (
    CHUNK,
    PIECE,
    SLOTS,
    GroupShape,
    MatrixLane,
    constant_swizzle,
    line_of,
    swizzle,
)
from twla_jax.ops.hopper import threads

_SPLAT = plgpu.Layout.WG_SPLAT


def start_copies(cache, ring_smem, slot, step, end, *, shape: GroupShape) -> None:
    """Start the copies of a step's entries into a slot of the warp's ring, as they lie in memory but for the swizzle.

    Args:
      cache: keys and values, and the scales of both if they are int8.
      ring_smem: slots of all warps.
      slot: number of the slot.
      step: number of the step.
      end: the first position that is not copied; what its place in the slot holds remains.
      shape: how the heads are split up.
    """

    @threads.on_threads(arg_types=(*[_SPLAT] * 3, *[plgpu.RefType()] * (1 + len(cache))))
    def run(_, slot, step, end, ring, keys, values, *scales):
        slot, step, end = map(threads.splat_word, (slot, step, end))
        me, whole = MatrixLane(shape), shape.d * shape.size
        pieces, at_once = whole // PIECE, threads.WARP * PIECE // whole
        row, first = me.lane // pieces, me.first(step)
        to = me.slot(threads.address(ring), slot)
        line, within = line_of(row, whole), (me.lane & (pieces - 1)) * PIECE ^ swizzle(row)
        threads.warp_barrier()  # until no lane reads the slot any more
        seen = [first + row + i < end for i in range(0, CHUNK, at_once)]
        for kind, ref in enumerate((keys, values)):
            for i, condition in enumerate(seen):
                place = (within ^ constant_swizzle(i * at_once)) + (i * threads.WARP * PIECE)
                at = to + line + place + kind * CHUNK * whole
                offset = first * whole + me.lane * PIECE + i * threads.WARP * PIECE
                threads.copy(at, ref, offset, PIECE // 4, condition=condition)
        position = first + (me.lane & (CHUNK - 1))
        for i, ref in enumerate(scales):
            mine = threads.both(position < end, (me.lane // CHUNK).equals(i))
            at = to + me.lane * 4 + 2 * CHUNK * whole
            threads.copy(at, ref, position * 4, 1, condition=mine)

    run(slot, step, end, ring_smem, *cache)


def end_copies() -> None:
    """End a batch of copies."""
    threads.on_threads()(lambda _: threads.end_copies())()


def wait_for_copies() -> None:
    """Wait for the oldest batch of copies: all but one less than there are slots."""
    threads.on_threads()(lambda _: threads.wait_for_copies(SLOTS - 1))()
