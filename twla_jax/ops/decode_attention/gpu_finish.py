"""Combines the softmaxes of warps and blocks in shared memory (Mosaic GPU)."""

import functools

from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.attention.splits import LEAST_SUM
from twla_jax.ops.decode_attention.gpu_heads import HeadShape, KeyLane
from twla_jax.ops.decode_attention.gpu_lanes import dot
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Real, Word


def finish(state, partials_smem, of_blocks_smem, outputs, first_head, split, *, shape: HeadShape) -> None:
    """Write the mix over all warps and blocks, each weighted by its share of the softmax's sum.

    When splits are not merged here, write this block's own mix, and its (largest score, sum), to the two outputs.
    """
    config, count, block = shape.config, state.shape[0] // 128, shape.config.warps * threads.WARP
    width, numbers = shape.d + 2, config.queries * shape.d

    @threads.on_threads(
        arg_types=(
            threads.per_thread(count),
            plgpu.Layout.WG_SPLAT,
            plgpu.Layout.WG_SPLAT,
            *[plgpu.RefType()] * (2 + len(outputs)),
        )
    )
    def write(_, state, first_head, split, partials, of_blocks, out, *softmax):
        split = threads.splat_word(split)
        me, at = KeyLane(shape, split), threads.address(partials)
        values, size = threads.reals(state), 2 + shape.count
        for j in range(config.queries):
            top, *sums = values[j * size : (j + 1) * size]
            sums = [me.over_rows(each, Real.__add__) for each in sums]
            to = at + (me.warp * config.queries + j) * (4 * width)
            with threads.when(me.row.equals(0)):
                for i, each in enumerate(sums[1:]):
                    threads.store(to + me.feature * 4, each, offset=8 + 4 * i)
            with threads.when(me.lane.equals(0)):
                threads.store(to, top)
                threads.store(to, sums[0], offset=4)
        threads.barrier(block)

        def place(index: Word, of: Word | int) -> tuple[Word, Word]:
            """Return where the largest score and sum of output `index` are, and where its number is."""
            to = at + (threads.word(0) + of) * (4 * width * config.queries)
            to = to + (index // shape.d) * (4 * width)
            return to, to + (index % shape.d) * 4 + 8

        def combine(partials: list[tuple[Real, Real, Real]]) -> tuple[Real, Real, Real]:
            top = functools.reduce(Real.most, [partial[0] for partial in partials])
            shares = [threads.power_of_two(partial[0] - top) for partial in partials]
            total, mixed = (dot([partial[i] for partial in partials], shares) for i in (1, 2))
            return top, total, mixed

        def each_output(limit: int, act) -> None:
            for i in range(-(-limit // block)):
                index = threads.thread() + i * block
                with threads.when(index < limit):
                    act(index)

        def of_warps(index: Word) -> tuple[Real, Real, Real]:
            found = []
            for warp in range(config.warps):
                of_query, number = place(index, warp)
                found.append(
                    (
                        *[threads.load(of_query, offset=4 * i)[0].real() for i in range(2)],
                        threads.load(number)[0].real(),
                    )
                )
            return combine(found)

        def store_output(index: Word, result: tuple[Real, Real, Real]) -> None:
            top, total, mixed = result
            # Splits that are not merged here may have seen no position.
            mixed = mixed / (total.most(LEAST_SUM) if softmax else total)
            threads.store_real(out, threads.splat_word(first_head) * shape.d + index, mixed)
            if softmax:
                head = threads.splat_word(first_head) + index // shape.d
                with threads.when((index % shape.d).equals(0)):
                    for i, each in enumerate((top, total)):
                        threads.store_real(softmax[0], head * 2 + i, each)

        if config.splits == 1 or softmax:
            each_output(numbers, lambda index: store_output(index, of_warps(index)))
            return

        share, received = numbers // config.splits, threads.address(of_blocks)

        def send(index: Word) -> None:
            to = received + ((split * (3 * share)) + index % share) * 4
            there = threads.address_of_block(to, index // share)
            for i, each in enumerate(of_warps(index)):
                threads.store_of_block(there, each, offset=4 * share * i)

        def of_all_blocks(index: Word) -> None:
            found = []
            for block in range(config.splits):
                at = received + index * 4
                numbers = [threads.load(at, offset=4 * share * (3 * block + i))[0].real() for i in range(3)]
                found.append(tuple(numbers))
            store_output(split * share + index, combine(found))

        threads.cluster_wait()  # until all blocks have started
        each_output(numbers, send)
        threads.cluster_barrier()
        each_output(share, of_all_blocks)

    write(state, first_head, split, partials_smem, of_blocks_smem, *outputs)
