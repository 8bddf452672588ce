"""Adds up what the blocks of a cluster have summed, each over columns of its own (Mosaic GPU).

The block with the number of a half of the rows finishes it; the others store their sums into its shared memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector
from jaxtyping import Array, Int32

from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.limits import WGMMA_ROWS
from twla_jax.ops.hopper.threads import Word
from twla_jax.ops.ternary_matmul.gpu_many_rings import LAYOUT
from twla_jax.ops.ternary_matmul.tile_configs import ManyTileConfig

_PAIR = 8  # bytes: a register of the sums' layout has two neighbours
_THREADS = 128  # of a warpgroup


def scratch_types(config: ManyTileConfig) -> dict[str, Any]:
    """Return the shared memory of other blocks' sums, for one half of the rows, and the halves' barriers."""
    if not config.split:
        return {}
    barriers = plgpu.ClusterBarrier(
        collective_axes=("cluster",), num_barriers=config.warpgroups // config.lines
    )
    sums = plgpu.SMEM((config.cluster - 1, WGMMA_ROWS * config.tokens), jnp.int32)
    return {"sums": sums, "sent": barriers, "taken": barriers}


def finishes(half: jax.Array) -> Callable[[Callable[[], None]], None]:
    """Return the decorator of what is done only in the block that finishes a half."""
    return pl.when(lax.axis_index("cluster") == half)


def add(i, half, own: jax.Array, finish: Callable[[jax.Array], None], *, sums, sent, taken) -> None:
    """Finish output i of a half with the sums of all blocks, in the block that finishes it."""
    block = lax.axis_index("cluster")
    pl.when(i > 0)(lambda: plgpu.barrier_wait(taken.at[half]))

    @pl.when(block != half)
    def _():
        send(own, sums, half, jnp.where(block > half, block - 1, block))
        plgpu.barrier_arrive(sent.at[half])
        plgpu.barrier_arrive(taken.at[half])

    @finishes(half)
    def _():
        plgpu.barrier_arrive(sent.at[half])
        plgpu.barrier_wait(sent.at[half])
        total = own + received(sums, half, own.shape)
        plgpu.barrier_arrive(taken.at[half])
        finish(total)


def end(half, *, sums, sent, taken) -> None:
    """Wait until no block of the cluster reads or writes another one's memory."""
    del sums, sent
    plgpu.barrier_wait(taken.at[half])


def send(own: Int32[Array, "64 tokens"], sums, half, place) -> None:
    """Store a warpgroup's sums in block `half`, at one of its places, before what follows."""

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 2))
    def store(_, own, sums, half, place):
        half, at = threads.splat_word(half), _place(sums, threads.splat_word(place))
        at = threads.address_of_block(at, half)
        words = threads.words(own)
        for j, (low, high) in enumerate(zip(words[::2], words[1::2], strict=True)):
            ptx = f"st.shared::cluster.v2.b32 [$2+{j * _THREADS * _PAIR}], {{$0, $1}};"
            utils.inline_ptx(ptx, low.value, high.value, at.value, has_side_effects=True)
        threads.barrier(_THREADS, half)
        _fence()

    store(own, sums, half, place)  # pyright: ignore[reportCallIssue]


def received(sums, half, shape: tuple[int, ...]) -> Int32[Array, "64 tokens"]:
    """Return the sum of what the other blocks sent. All threads of the warpgroup have read it then."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=LAYOUT),
    )
    def load(_, sums, half):
        _fence()
        layout, places = LAYOUT.to_mgpu(), [_place(sums, i) for i in range(threads.shape(sums)[0])]
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        pair = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
        for j, index in enumerate(np.ndindex(registers.shape)):
            found = [threads.load(at, 2, offset=j * _THREADS * _PAIR) for at in places]
            low, high = (functools.reduce(Word.__add__, each) for each in zip(*found, strict=True))
            registers[index] = vector.from_elements(pair, [low.value, high.value])
        threads.barrier(_THREADS, threads.splat_word(half))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return load(sums, half)  # pyright: ignore[reportCallIssue]


def _place(sums: ir.Value, index: Word | int) -> Word:
    """Return the address of this thread's first pair of a place of `[places, numbers]`."""
    within = threads.thread() & (_THREADS - 1)
    return threads.address(sums) + (threads.word(0) + index) * (4 * threads.shape(sums)[1]) + within * _PAIR


def _fence() -> None:
    """Order this thread's reads and writes, and what it has waited for, for all threads of the cluster."""
    utils.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)
