"""Adds up what the two blocks of a cluster have summed, each over columns of its own (Mosaic GPU).

The second block stores its sums into the first one's shared memory, in the order of its registers, and the first
finishes them.
"""

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
    """Return the shared memory of the other block's sums, and what says that they are there, and read."""
    if not config.split:
        return {}
    sums = plgpu.SMEM((WGMMA_ROWS * config.tokens,), jnp.int32)
    barrier = plgpu.ClusterBarrier(collective_axes=("cluster",))
    return {"sums": sums, "sent": barrier, "taken": barrier}


def add(i, own: jax.Array, finish: Callable[[jax.Array], None], *, sums, sent, taken) -> None:
    """Finish output i in the first block with the sums of both; one warpgroup of each calls this."""
    block = lax.axis_index("cluster")
    pl.when(i > 0)(lambda: plgpu.barrier_wait(taken))

    @pl.when(block == 1)
    def _():
        send(own, sums)
        plgpu.barrier_arrive(sent)
        plgpu.barrier_arrive(taken)

    @pl.when(block == 0)
    def _():
        plgpu.barrier_arrive(sent)
        plgpu.barrier_wait(sent)
        total = own + received(sums, own.shape)
        plgpu.barrier_arrive(taken)
        finish(total)


def end(*, sums, sent, taken) -> None:
    """Wait until no block of the cluster reads or writes the other one's memory."""
    del sums, sent
    plgpu.barrier_wait(taken)


def send(own: Int32[Array, "64 tokens"], sums) -> None:
    """Store a warpgroup's sums in the first block, before what follows."""

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.RefType()))
    def store(_, own, sums):
        at = threads.address_of_block(_place(sums), threads.word(0))
        words = threads.words(own)
        for j, (low, high) in enumerate(zip(words[::2], words[1::2], strict=True)):
            ptx = f"st.shared::cluster.v2.b32 [$2+{j * _THREADS * _PAIR}], {{$0, $1}};"
            utils.inline_ptx(ptx, low.value, high.value, at.value, has_side_effects=True)
        threads.barrier(_THREADS)
        _fence()

    store(own, sums)  # pyright: ignore[reportCallIssue]


def received(sums, shape: tuple[int, ...]) -> Int32[Array, "64 tokens"]:
    """Return what the other block sent. All threads of the warpgroup have read it then."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=LAYOUT),
    )
    def load(_, sums):
        _fence()
        layout, at = LAYOUT.to_mgpu(), _place(sums)
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        pair = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
        for j, index in enumerate(np.ndindex(registers.shape)):
            low, high = threads.load(at, 2, offset=j * _THREADS * _PAIR)
            registers[index] = vector.from_elements(pair, [low.value, high.value])
        threads.barrier(_THREADS)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return load(sums)  # pyright: ignore[reportCallIssue]


def _place(sums: ir.Value) -> Word:
    """Return the address of this thread's first pair."""
    return threads.address(sums) + (threads.thread() & (_THREADS - 1)) * _PAIR


def _fence() -> None:
    """Order this thread's reads and writes, and what it has waited for, for all threads of the cluster."""
    utils.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)
