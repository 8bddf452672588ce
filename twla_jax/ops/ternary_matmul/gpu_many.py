"""Multiplies more than eight int8 tokens by two-bit weights on Hopper GPUs (Pallas Mosaic GPU), on tensor cores.

Two warpgroups multiply, 64 weight rows each, which they unpack in registers as the left operand of `wgmma`. Each has
rows of its own; or both have the same, where that keeps more multiprocessors busy, and every other tile of columns. A
third warpgroup keeps rings of tiles filled, across the outputs that a block computes one after the other. While one
warpgroup scales its sums, the other multiplies. Blocks of a cluster share tokens, which are read once for all, or
columns.

Where a row has several (α, μ), its weights are unpacked to whole numbers of its step, which int8 holds: sums of all
columns stay integers, and registers have room for more tokens than they would beside sums in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8, Int32

from twla_jax.core.packing import PLANE
from twla_jax.ops.hopper.limits import WARPGROUPS, WGMMA_ROWS
from twla_jax.ops.ternary_matmul import (
    gpu_many_blocks,
    gpu_many_outputs,
    gpu_many_rings,
    tile_configs,
)
from twla_jax.ops.ternary_matmul.gpu_many_outputs import ManyOutputs
from twla_jax.ops.ternary_matmul.gpu_many_rings import LAYOUT, ManyRings, ManyWork
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import pad_columns

MOST_WIDE = 32  # codes of wide tokens, the most that a GPU was seen to add up at once


def is_faster(tokens: int, weight: KernelWeight, out_dtype) -> bool:
    """Return whether more than `gpu_few` takes is multiplied faster here than by `gpu_mma`.

    Sixteen tokens are where blocks share columns: 4096×11008 took 8.8 µs, by `gpu_mma` 14.6 (H200).
    """
    if tokens > tile_configs.FEW_TOKENS:
        return True
    config = tile_configs.many_tile_config(tokens, weight.rows, jnp.dtype(out_dtype).itemsize)
    return 2 * tokens > config.tokens and config.split


def matmul(
    x: Int8[Array, "t m"],
    sums: Int32[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    residual: Float[Array, "t n"] | None = None,
    *,
    out_dtype,
    config: tile_configs.ManyTileConfig | None = None,
    wide: bool = False,
) -> Float[Array, "t n"]:
    """Return what `reference.matmul` computes, for int8 x.

    If `wide`, the second half of x are the tokens' finer codes, and there are half as many outputs; a block has them
    all.
    """
    t = len(x) // 2 if wide else len(x)
    if wide:
        x, sums, scale, zero_point = (_pad_halves(each) for each in (x, sums, scale, zero_point))
    config = config or tile_configs.many_tile_config(len(x), weight.rows, jnp.dtype(out_dtype).itemsize)
    if wide and config.tokens != len(x):
        raise ValueError(f"a block has {config.tokens} of {len(x)} codes")
    # The copy engine swizzles pieces of 8 tokens by 128 bytes: it pads past the end, but cannot cut a piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    x = jnp.pad(x, ((0, -t % 8), (0, 0)))
    added = []
    if residual is not None and _adds(residual, weight, out_dtype):
        added = [jnp.pad(residual, ((0, -t % (16 if wide else 8)), (0, 0)))]
    # Sums of int8 weights need no sums of tokens.
    last = weight.steps if weight.grouped else jnp.pad(sums.sum(-1).astype(jnp.float32), (0, -t % 8))
    work = ManyWork(tokens=len(x), weight_rows=weight.rows, config=config)
    outputs = len(x) // 2 if wide else len(x)
    y = plgpu.kernel(
        functools.partial(_kernel, work=work, weight=weight, wide=wide),
        out_type=jax.ShapeDtypeStruct((outputs, weight.rows), out_dtype),
        kernel_name="ternary_matmul_many",
        scratch_types={
            "of_rings": gpu_many_rings.scratch_types(work, weight),
            "of_outputs": gpu_many_outputs.scratch_types(work, out_dtype, grouped=weight.grouped, wide=wide),
            "of_lines": line_scratch_types(config),
            "of_blocks": gpu_many_blocks.scratch_types(config),
        },
        **gpu_many_rings.launch(work),
    )(weight.codes, weight.gpu_scales, weight.row_sums, weight.bias, x, scale, zero_point, last, *added)
    return weight.finished(y[:t], None if added else residual)


def _pad_halves(each: jax.Array) -> jax.Array:
    """Return both halves, of as many tokens each, filled up to a multiple of 16."""
    halves = each.reshape(2, -1, *each.shape[1:])
    missing = -halves.shape[1] % 16
    if not missing:
        return each
    return jnp.pad(halves, [(0, 0), (0, missing)] + [(0, 0)] * (each.ndim - 1)).reshape(-1, *each.shape[1:])


def _adds(residual: jax.Array, weight: KernelWeight, out_dtype) -> bool:
    """Return whether the kernel adds the residual itself: it has all rows, and two bytes a number as the outputs."""
    dtype = residual.dtype
    return residual.shape[1] == weight.rows and dtype == out_dtype and dtype.itemsize == 2


def line_scratch_types(config: tile_configs.ManyTileConfig) -> dict[str, Any]:
    """Return the shared memory that passes the second line's sums to the first, if there are two."""
    if config.lines == 1:
        return {}
    sums = plgpu.SMEM((WGMMA_ROWS, config.tokens), jnp.int32)
    return {"sums": sums, "added": plgpu.Barrier(), "taken": plgpu.Barrier()}


def _kernel(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    x_gmem,
    scale_gmem,
    zero_point_gmem,
    last_gmem,  # steps of rows where they have several groups, else sums of tokens
    *residual_and_out_gmem,
    of_rings,
    of_outputs,
    of_lines,
    of_blocks,
    work: ManyWork,
    weight: KernelWeight,
    wide: bool,
):
    *residual_gmem, out_gmem = residual_and_out_gmem
    group, lines = lax.axis_index("warpgroup"), work.config.lines
    rings = ManyRings(work=work, weight=weight, **of_rings)

    @pl.when(group == WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @plgpu.warp_map
        def _(line):
            pl.when(line < lines)(lambda: rings.fill(line, codes_gmem, scales_gmem, x_gmem))

    @pl.when(group < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        line, half = lax.rem(group, lines), lax.div(group, lines)
        outputs = ManyOutputs(
            half=half,
            wide=wide,
            scale_gmem=scale_gmem,
            zero_point_gmem=zero_point_gmem,
            row_sums_gmem=row_sums_gmem,
            bias_gmem=bias_gmem,
            steps_gmem=last_gmem if weight.grouped else None,
            scales_gmem=scales_gmem,
            sums_gmem=last_gmem,
            residual_gmem=residual_gmem[0] if residual_gmem else None,
            out_gmem=out_gmem,
            **of_outputs,
        )

        @pl.loop(0, work.mine())
        def _(i):
            first_token, first_row = work.place(i)
            first_row += half * WGMMA_ROWS

            def fetch():
                outputs.fetch(first_token, first_row)

            def finish(sums):
                outputs.finish(sums, first_token, first_row)

            if lines == 1:
                fetch()
                return finish(rings.sums(i, line, half))
            here, end = line == 0, finish
            if work.config.split:
                here = jnp.logical_and(here, lax.axis_index("cluster") == 0)
                end = functools.partial(gpu_many_blocks.add, i, finish=finish, **of_blocks)
            pl.when(here)(fetch)
            _add_lines(i, line, rings.sums(i, line, half), end, **of_lines)

        if work.config.split:
            adds = jnp.logical_and(work.mine() > 0, line == 0)
            pl.when(adds)(lambda: gpu_many_blocks.end(**of_blocks))
        plgpu.wait_smem_to_gmem(0)


def _add_lines(i, line, own: jax.Array, finish: Callable[[jax.Array], None], *, sums, added, taken) -> None:
    """Finish in the first of two lines what both have summed."""

    @pl.when(line == 1)
    def _():
        pl.when(i > 0)(lambda: plgpu.barrier_wait(taken))
        sums[...] = own
        plgpu.barrier_arrive(added)

    @pl.when(line == 0)
    def _():
        plgpu.barrier_wait(added)
        total = own + plgpu.load(sums, layout=LAYOUT, optimized=False)
        plgpu.barrier_arrive(taken)
        finish(total)
