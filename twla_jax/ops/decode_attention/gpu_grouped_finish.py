"""Combines the softmaxes of a group's warps, and of the new token's own entry, in shared memory (Mosaic GPU)."""

import functools

from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.attention.splits import LEAST_SUM
from twla_jax.ops.decode_attention.gpu_grouped_heads import place_of_head
from twla_jax.ops.decode_attention.gpu_grouped_lanes import LOWEST
from twla_jax.ops.decode_attention.gpu_grouped_shape import SLOTS, GroupShape, MatrixLane
from twla_jax.ops.decode_attention.gpu_lanes import dot
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Real, Word

_SPLAT = plgpu.Layout.WG_SPLAT


def attend_to_itself(heads_smem, own_smem, split, *, shape: GroupShape) -> None:
    """Write the softmax over the new token's own entry, a warp a query, as `finish` reads it; for one split only."""
    config, d = shape.config, shape.d

    @threads.on_threads(arg_types=(_SPLAT, *[plgpu.RefType()] * 2))
    def run(_, split, heads, own):
        me, at, zero = MatrixLane(shape), threads.address(heads), threads.real(0.0)
        mine = threads.splat_word(split).equals(0)
        of_kv = (place_of_head(at, threads.word(config.queries + i), shape) for i in range(2))
        key, value = (_own(each, me, shape) for each in of_kv)
        for first in range(0, config.queries, config.warps):
            number = me.warp + first
            with threads.when(number < config.queries):
                query = _own(place_of_head(at, number, shape), me, shape)
                score = dot(query[:-1], key[:-1])
                for i in range(5):
                    score = score + threads.shuffle(score, 1 << i)
                score, to = score * query[-1], threads.address(own)
                if shape.quantized:
                    score = score * key[-1]
                to = to + number * (4 * (d + 2))
                for i, each in enumerate(value[:-1]):
                    each = each * value[-1] if shape.quantized else each
                    each = threads.select(mine, each, zero)
                    threads.store(to + me.lane * 4, each, offset=8 + 4 * i * threads.WARP)
                with threads.when(me.lane.equals(0)):
                    score = threads.select(mine, score, threads.real(LOWEST))
                    threads.store(to, score, threads.select(mine, threads.real(1.0), zero))

    run(split, heads_smem, own_smem)


def _own(at: Word, me: MatrixLane, shape: GroupShape) -> list[Real]:
    """Return a lane's features of a head, and the number that comes after them."""
    found = [threads.load(at + me.lane * 4, offset=4 * i)[0] for i in range(0, shape.d, threads.WARP)]
    return [each.real() for each in [*found, *threads.load(at, offset=4 * shape.d)]]


def finish(state, ring_smem, own_smem, outputs, first_head, *, shape: GroupShape) -> None:
    """Write the mix over all warps and the new token, each weighted by its share of the softmax's sum.

    A warp leaves its own in the first of its slots, which it no longer needs, and on. If there is a second output, it
    takes each query's (largest score, sum).
    """
    config, d, block = shape.config, shape.d, shape.config.warps * threads.WARP

    @threads.on_threads(
        arg_types=(threads.per_thread(state.shape[0] // 128), _SPLAT, *[plgpu.RefType()] * (2 + len(outputs)))
    )
    def write(_, state, first_head, ring, own, out, *softmax):
        me, numbers = MatrixLane(shape), threads.reals(state)
        mine = me.slot(threads.address(ring), 0)
        tops, totals, mixed = numbers[:2], numbers[2:4], numbers[4:]
        for distance in (4, 8, 16):
            totals = [each + threads.shuffle(each, distance) for each in totals]
        for i in range(2):
            query = me.column * 2 + i
            to = mine + query * (4 * (d + 2))
            with threads.when(query < config.queries):
                for tile in range(d // 16):
                    pair = mixed[4 * tile + i :: 2][:2]
                    threads.store(to + me.value_feature(2 * tile) * 4, *pair, offset=8)
                with threads.when(me.row.equals(0)):
                    threads.store(to, tops[i], totals[i])
        me.barrier()
        first = threads.splat_word(first_head) * d
        first_place = threads.address(ring) + me.group * (config.warps * 4 * SLOTS * shape.slot)
        for i in range(-(-config.queries * d // block)):
            index = me.thread + i * block
            with threads.when(index < config.queries * d):
                places = [first_place + 4 * SLOTS * shape.slot * warp for warp in range(config.warps)]
                found = []
                for place in [*places, threads.address(own)]:
                    here = place + (index // d) * (4 * (d + 2))
                    head = [each.real() for each in threads.load(here, 2)]
                    found.append((*head, threads.load(here + (index % d) * 4, offset=8)[0].real()))
                top = functools.reduce(Real.most, [each[0] for each in found])
                shares = [threads.power_of_two(each[0] - top) for each in found]
                total, sum_of_mixes = (dot([each[j] for each in found], shares) for j in (1, 2))
                # A split may have seen no position.
                total_or_more = total.most(LEAST_SUM) if softmax else total
                threads.store_real(out, first + index, sum_of_mixes / total_or_more)
                if softmax:
                    with threads.when((index % d).equals(0)):
                        to = (first + index) // d * 2
                        for j, each in enumerate((top, total)):
                            threads.store_real(softmax[0], to + j, each)

    write(state, first_head, ring_smem, own_smem, *outputs)
