"""How the softmaxes of warps and blocks meet, in shared memory (Mosaic GPU)."""

import functools

from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.attention.parts import LEAST_SUM
from twla_jax.ops.decode_attention.gpu_lanes import Lane, Shape, dot
from twla_jax.ops.hopper import threads as threads
from twla_jax.ops.hopper.threads import Real, Word


def finish(state, parts_smem, of_blocks_smem, outputs, first_head, split, *, shape: Shape) -> None:
    """The mix of all warps' and blocks' parts, each weighed by its share of the sum of the softmax.

    Of parts that stay apart, the mix of this block's warps, and what its softmax has, for the second of the outputs.
    """
    tiles, count, block = shape.tiles, state.shape[0] // 128, shape.tiles.warps * threads.WARP
    width, numbers = shape.d + 2, tiles.queries * shape.d

    @threads.on_threads(
        arg_types=(
            threads.per_thread(count),
            plgpu.Layout.WG_SPLAT,
            plgpu.Layout.WG_SPLAT,
            *[plgpu.RefType()] * (2 + len(outputs)),
        )
    )
    def write(_, state, first_head, split, parts, of_blocks, out, *softmax):
        split = threads.splat_word(split)
        me, at = Lane(shape, split), threads.address(parts)
        values, size = threads.reals(state), 2 + shape.count
        for j in range(tiles.queries):
            top, *sums = values[j * size : (j + 1) * size]
            sums = [me.over_rows(each, Real.__add__) for each in sums]
            to = at + (me.warp * tiles.queries + j) * (4 * width)
            with threads.when(me.row.equals(0)):
                for i, each in enumerate(sums[1:]):
                    threads.store(to + me.feature * 4, each, offset=8 + 4 * i)
            with threads.when(me.lane.equals(0)):
                threads.store(to, top)
                threads.store(to, sums[0], offset=4)
        threads.barrier(block)

        def place(index: Word, of: Word | int) -> tuple[Word, Word]:
            """Where a part's largest score and sum are for an output, and where its number is."""
            to = at + (threads.word(0) + of) * (4 * width * tiles.queries)
            to = to + (index // shape.d) * (4 * width)
            return to, to + (index % shape.d) * 4 + 8

        def combine(parts: list[tuple[Real, Real, Real]]) -> tuple[Real, Real, Real]:
            top = functools.reduce(Real.most, [part[0] for part in parts])
            shares = [threads.power_of_two(part[0] - top) for part in parts]
            total, mixed = (dot([part[i] for part in parts], shares) for i in (1, 2))
            return top, total, mixed

        def each_output(limit: int, act) -> None:
            for i in range(-(-limit // block)):
                index = threads.thread() + i * block
                with threads.when(index < limit):
                    act(index)

        def of_warps(index: Word) -> tuple[Real, Real, Real]:
            found = []
            for warp in range(tiles.warps):
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
            # Of parts that stay apart, some may have seen no position.
            mixed = mixed / (total.most(LEAST_SUM) if softmax else total)
            threads.store_real(out, threads.splat_word(first_head) * shape.d + index, mixed)
            if softmax:
                head = threads.splat_word(first_head) + index // shape.d
                with threads.when((index % shape.d).equals(0)):
                    for i, each in enumerate((top, total)):
                        threads.store_real(softmax[0], head * 2 + i, each)

        if tiles.splits == 1 or softmax:
            each_output(numbers, lambda index: store_output(index, of_warps(index)))
            return

        share, received = numbers // tiles.splits, threads.address(of_blocks)

        def send(index: Word) -> None:
            to = received + ((split * (3 * share)) + index % share) * 4
            there = threads.address_of_block(to, index // share)
            for i, each in enumerate(of_warps(index)):
                threads.store_of_block(there, each, offset=4 * share * i)

        def of_all_blocks(index: Word) -> None:
            found = []
            for block in range(tiles.splits):
                at = received + index * 4
                numbers = [threads.load(at, offset=4 * share * (3 * block + i))[0].real() for i in range(3)]
                found.append(tuple(numbers))
            store_output(split * share + index, combine(found))

        threads.cluster_wait()  # until all blocks have begun
        each_output(numbers, send)
        threads.cluster_barrier()
        each_output(share, of_all_blocks)

    write(state, first_head, split, parts_smem, of_blocks_smem, *outputs)
