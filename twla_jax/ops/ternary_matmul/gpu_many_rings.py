"""Keeps tiles of weights and tokens in rings of shared memory (Mosaic GPU): one warp keeps those of a line filled.

The warpgroups of a line unpack weights in registers and multiply them by `wgmma`, whose right operand are the tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.core.packing import PLANE
from twla_jax.ops.hopper.limits import CLUSTERS, WARPGROUPS, WGMMA_ROWS
from twla_jax.ops.hopper.swizzle import swizzle_transforms
from twla_jax.ops.ternary_matmul.gpu_unpack import unpack_rows, unpack_weights
from twla_jax.ops.ternary_matmul.tile_configs import ManyTileConfig
from twla_jax.ops.ternary_matmul.weight import PackedWeight

LAYOUT = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyWork:
    """Describes the outputs, of `tokens` by `weight_rows`; each block of a cluster has its own `rows` of an output."""

    tokens: int
    weight_rows: int
    config: ManyTileConfig

    @property
    def halves(self) -> int:
        """Return the number of halves of 64 rows each that a block has at once."""
        return WARPGROUPS // self.config.lines

    @property
    def rows(self) -> int:
        """Return the rows that a block has at once."""
        return WGMMA_ROWS * self.halves

    @property
    def outputs(self) -> int:
        """Return the number of outputs, which clusters share and compute one after the other."""
        return pl.cdiv(self.weight_rows, self.rows * self.shared) * pl.cdiv(self.tokens, self.config.tokens)

    @property
    def shared(self) -> int:
        """Return the number of blocks that share the tokens of an output, not its rows."""
        return 1 if self.config.split else self.config.cluster

    @property
    def parts(self) -> int:
        """Return into how many parts the columns are divided."""
        return self.config.lines * self.config.cluster // self.shared

    def mine(self) -> jax.Array:
        """Return how many outputs this block has."""
        block, blocks = lax.axis_index("block"), lax.axis_size("block")
        return lax.div(self.outputs - block + blocks - 1, blocks)

    def place(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the first token and the first row of this block's output i."""
        tokens = pl.cdiv(self.tokens, self.config.tokens)
        output = lax.axis_index("block") + i * lax.axis_size("block")
        rows = lax.div(output, tokens)
        if not self.config.split:
            rows = rows * self.config.cluster + lax.axis_index("cluster")
        return lax.rem(output, tokens) * self.config.tokens, rows * self.rows


def launch(work: ManyWork) -> dict[str, Any]:
    """Return how many blocks and threads `plgpu.kernel` starts: no more clusters than fit on the GPU at once."""
    return {
        "grid": (min(work.outputs, CLUSTERS[work.config.cluster]),),
        "grid_names": ("block",),
        "cluster": (work.config.cluster,),
        "cluster_names": ("cluster",),
        "num_threads": WARPGROUPS + 1,
        "thread_name": "warpgroup",
        "compiler_params": plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    }


def scratch_types(work: ManyWork, weight: PackedWeight, dtype=jnp.int8) -> dict[str, Any]:
    """Return the shared memory of `ManyRings`, by its fields, for tokens in `dtype`."""
    config, lines, halves = work.config, work.config.lines, work.halves
    return {
        "codes": plgpu.SMEM(
            (lines, config.stages, work.rows, PLANE), jnp.uint8, transforms=swizzle_transforms(1)
        ),
        "scales": plgpu.SMEM(
            (lines, config.stages, weight.parameters if weight.grouped else weight.planes, work.rows),
            weight.gpu_scales.dtype,
        ),
        "x": plgpu.SMEM(
            (lines, config.x_slots, config.tokens, config.x_planes * PLANE),
            dtype,
            transforms=swizzle_transforms(jnp.dtype(dtype).itemsize),
        ),
        "filled": plgpu.Barrier(num_arrivals=2 if weight.grouped else 1, num_barriers=lines * config.stages),
        "freed": plgpu.Barrier(num_arrivals=halves, num_barriers=lines * config.stages),
        "x_filled": plgpu.Barrier(num_barriers=lines * config.x_slots),
        "x_freed": plgpu.Barrier(num_arrivals=halves, num_barriers=lines * config.x_slots)
        if config.split
        else plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=halves, num_barriers=lines * config.x_slots
        ),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyRings:
    """Holds, for each line, `stages` tiles of codes and scales, and tokens in shares of a tile's planes."""

    work: ManyWork
    weight: PackedWeight
    codes: Any
    scales: Any
    x: Any
    filled: Any
    freed: Any
    x_filled: Any
    x_freed: Any

    @property
    def shares(self) -> int:
        """Return the number of shares of a tile's tokens."""
        return self.weight.planes // self.work.config.x_planes

    def part(self, line: jax.Array) -> jax.Array:
        """Return which part of the columns a line has."""
        config = self.work.config
        return lax.axis_index("cluster") * config.lines + line if config.split else line

    def own(self, line: jax.Array) -> jax.Array:
        """Return how many of an output's tiles a line has."""
        parts = self.work.parts
        return lax.div(self.weight.column_tiles - self.part(line) + parts - 1, parts)

    def fill(self, line: jax.Array, codes_gmem, scales_gmem, x_gmem) -> None:
        """Load all that a line reads, by one warp."""
        work, config, own = self.work, self.work.config, self.own(line)
        stages, x_slots, width = config.stages, config.x_slots, config.x_planes * PLANE
        last = work.mine() * own

        @pl.loop(0, last)
        def _(k):
            i, own_tile = lax.div(k, own), lax.rem(k, own)
            first_token, first_row = work.place(i)
            tile, slot = own_tile * work.parts + self.part(line), lax.rem(k, stages)
            tokens, rows = pl.ds(first_token, config.tokens), pl.ds(first_row, work.rows)
            barrier = line * stages + slot
            pl.when(k >= stages)(lambda: plgpu.barrier_wait(self.freed.at[barrier]))

            def copy(source, target):
                plgpu.copy_gmem_to_smem(source, target.at[line, slot], self.filled.at[barrier])

            copy(codes_gmem.at[tile, rows], self.codes)
            if self.weight.grouped:
                copy(scales_gmem.at[tile, :, rows], self.scales)
            for share in range(self.shares):
                x_slot, barrier = self._x_slot(k, share, line)
                again = self.shares * k + share >= x_slots
                pl.when(again)(lambda barrier=barrier: plgpu.barrier_wait(self.x_freed.at[barrier]))
                source = x_gmem.at[tokens, pl.ds((self.shares * tile + share) * width, width)]
                ends = source, self.x.at[line, x_slot], self.x_filled.at[barrier]
                plgpu.copy_gmem_to_smem(*ends, collective_axes=None if config.split else "cluster")

        # Other blocks of the cluster must be done with this one's memory before it ends.
        for barrier, slots, end in ((self.freed, stages, last), (self.x_freed, x_slots, self.shares * last)):

            @pl.loop(jnp.maximum(0, end - slots), end)
            def _(step, barrier=barrier, slots=slots):
                plgpu.barrier_wait(barrier.at[line * slots + lax.rem(step, jnp.int32(slots))])

    def sums(self, i: jax.Array, line: jax.Array, half: jax.Array) -> jax.Array:
        """Return the sums `[64, tokens]` int32 of this block's output i, over the line's columns."""
        own, tokens = self.own(line), self.work.config.tokens

        def step(k, acc):
            slot = lax.rem(k, self.work.config.stages)
            add = functools.partial(self._add_tile, k, slot, line, half)
            acc = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc))
            plgpu.barrier_arrive(self.x_freed.at[self._x_slot(k, self.shares - 1, line)[1]])
            plgpu.barrier_arrive(self.freed.at[line * self.work.config.stages + slot])
            return acc

        start = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, tokens), jnp.int32), LAYOUT)
        return lax.fori_loop(i * own, (i + 1) * own, step, start)

    def _x_slot(self, k, share: int, line) -> tuple[jax.Array, jax.Array]:
        """Return where a tile's share lies in the line's ring, and the number of its barrier."""
        slots = self.work.config.x_slots
        slot = lax.rem(self.shares * k + share, slots)
        return slot, line * slots + slot

    def _add_tile(self, k, slot, line, half, acc_ref) -> None:
        config, planes = self.work.config, range(self.weight.planes)
        rows = pl.ds(half * WGMMA_ROWS, WGMMA_ROWS)
        plgpu.barrier_wait(self.filled.at[line * config.stages + slot])
        packed = plgpu.load(self.codes.at[line, slot, rows], layout=plgpu.Layout.WGMMA_8BIT, optimized=False)
        of_planes = [self.scales.at[line, slot, plane, rows] for plane in planes if self.weight.grouped]
        pairs = [plgpu.load(ref, layout=LAYOUT.reduce(1), optimized=False) for ref in of_planes]
        x_slot = x_barrier = None
        for plane in planes:
            share, place = divmod(plane, config.x_planes)
            codes, previous = self._unpack(packed, pairs, plane), x_barrier
            if place == 0:
                x_slot, x_barrier = self._x_slot(k, share, line)
                plgpu.barrier_wait(self.x_filled.at[x_barrier])
            plgpu.wgmma(acc_ref, codes, self.x.at[line, x_slot, :, pl.ds(place * PLANE, PLANE)].T)
            if plane:
                plgpu.wgmma_wait(1)
            if plane and place == 0:
                plgpu.barrier_arrive(self.x_freed.at[previous])

    def _unpack(self, packed, pairs, plane: int) -> jax.Array:
        if not self.weight.grouped:
            return unpack_rows(packed, plane, exact=True, wide=True)[0]
        return unpack_weights(packed, plane, pairs[plane].astype(jnp.int32))
