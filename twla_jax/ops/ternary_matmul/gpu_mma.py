"""Multiplies up to sixteen int8 tokens, too long for `gpu_few`, by two-bit weights on Hopper GPUs (Mosaic GPU).

They are limited by loading the weights. Weight rows are the rows of `mma.sync` and tokens its columns, so that no more
than eight tokens are multiplied where there are no more. K is split between the warpgroups of a block, each with its
own ring of tiles in shared memory, of weights and of tokens, and added up there in a fixed order. Several blocks share
a multiprocessor: while one waits for its tiles, another multiplies. Tokens are read and written as they are, so nothing
stands between this kernel and the one that made the codes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref
from jaxtyping import Array, Float, Float32, Int8

from twla_jax.core.packing import PLANE, TILE
from twla_jax.ops.hopper.epilogue import rescale
from twla_jax.ops.ternary_matmul import tile_configs
from twla_jax.ops.ternary_matmul.gpu_rows import SWIZZLED
from twla_jax.ops.ternary_matmul.gpu_unpack import unpack_rows
from twla_jax.ops.ternary_matmul.weight import KernelWeight, fields_of_pair
from twla_jax.ops.tokens import pad_columns

MMA_ROWS = 64  # of a block: those of its warps' `mma.sync`

LHS, RHS, ACC = (
    kind(jnp.int8) for kind in (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
)


def matmul(
    x: Int8[Array, "t m"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
    config: tile_configs.MmaTileConfig | None = None,
) -> Float[Array, "t rows"]:
    """Return what `reference.matmul` computes, for int8 x."""
    t = len(x)
    config = config or tile_configs.mma_tile_config(t, weight.rows, weight.column_tiles)
    # The copy engine swizzles pieces of 8 tokens by 128 bytes: it pads past the end, but cannot cut a piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    x = jnp.pad(x, ((0, -t % 8 if t > 8 else 0), (0, 0)))
    n, groups, stages = config.tokens, config.warpgroups, config.stages
    return plgpu.kernel(
        functools.partial(_kernel, t=t, config=config, weight=weight),
        out_type=jax.ShapeDtypeStruct((t, weight.rows), out_dtype),
        grid=(weight.rows // MMA_ROWS,),
        grid_names=("rows",),
        num_threads=groups,
        thread_name="warpgroup",
        kernel_name="ternary_matmul_integer",
        scratch_types={
            "codes_smem": plgpu.SMEM((groups, stages, MMA_ROWS, PLANE), jnp.uint8, transforms=SWIZZLED),
            "x_smem": plgpu.SMEM((groups, stages, n, TILE), jnp.int8, transforms=SWIZZLED),
            "scales_smem": plgpu.SMEM((groups, stages, weight.parameters, MMA_ROWS), weight.gpu_scales.dtype),
            "partials_smem": plgpu.SMEM((groups, MMA_ROWS, n), jnp.float32),
            "filled": plgpu.Barrier(num_arrivals=3 if weight.grouped else 2, num_barriers=groups * stages),
            "added": plgpu.Barrier(num_arrivals=groups),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(weight.codes, weight.gpu_scales, weight.row_sums, weight.bias, weight.steps, x, scale, zero_point)


def _kernel(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    steps_gmem,
    x_gmem,
    scale_gmem,
    zero_point_gmem,
    out_gmem,
    *,
    codes_smem,
    x_smem,
    scales_smem,
    partials_smem,
    filled,
    added,
    t: int,
    config: tile_configs.MmaTileConfig,
    weight: KernelWeight,
):
    n = config.tokens
    group = lax.axis_index("warpgroup")
    first_row = lax.axis_index("rows") * MMA_ROWS
    rows = pl.ds(first_row, MMA_ROWS)
    steps = lax.div(weight.column_tiles - group + config.warpgroups - 1, config.warpgroups)

    def load_tokens(ref):
        column = plgpu.broadcasted_iota(jnp.int32, (MMA_ROWS, n), 1, layout=ACC)
        value = plgpu.layout_cast(jnp.zeros((MMA_ROWS, n), jnp.float32), ACC)
        for i in range(t):
            value = jnp.where(column == i, ref[i], value)
        return value

    def fetch(step, slot):
        tile = step * config.warpgroups + group
        barrier = filled.at[group * config.stages + slot]

        def copy(source, ring):
            plgpu.copy_gmem_to_smem(source, ring.at[group, slot], barrier)

        copy(codes_gmem.at[tile, rows], codes_smem)
        copy(x_gmem.at[pl.ds(0, n), pl.ds(tile * TILE, TILE)], x_smem)
        if weight.grouped:
            copy(scales_gmem.at[tile, :, rows], scales_smem)

    for slot in range(config.stages):
        pl.when(slot < steps)(functools.partial(fetch, jnp.int32(slot), slot))

    ones = plgpu.layout_cast(jnp.ones((MMA_ROWS, PLANE), jnp.int8), LHS)
    zero = plgpu.layout_cast(jnp.zeros((MMA_ROWS, n), jnp.int32), ACC)

    def step(k, carry):
        y, totals = carry
        slot = lax.rem(k, jnp.int32(config.stages))
        plgpu.barrier_wait(filled.at[group * config.stages + slot])
        packed = plgpu.load(codes_smem.at[group, slot], layout=LHS)
        for plane in range(4):
            x_plane = plgpu.load(x_smem.at[group, slot, :, pl.ds(plane * PLANE, PLANE)].T, layout=RHS)
            codes, factor = unpack_rows(packed, plane, exact=not weight.grouped)
            # Every row of a product with ones is the tokens' sum of codes Q, for μ, or for U = T + 1.
            if weight.grouped:
                total = plgpu.mma(zero, ones, x_plane).astype(jnp.float32)
                product = plgpu.mma(zero, codes, x_plane).astype(jnp.float32)
                pair = _load_row(scales_smem.at[group, slot, plane]).astype(jnp.int32)
                alpha, mu = (_spread(each, n) for each in fields_of_pair(pair))
                y += (alpha * (1 / factor)) * product + mu * total
            else:
                y, totals = plgpu.mma(y, codes, x_plane), plgpu.mma(totals, ones, x_plane)
        pl.when(k + config.stages < steps)(functools.partial(fetch, k + config.stages, slot))
        return y, totals

    start = zero.astype(jnp.float32) if weight.grouped else zero
    y, totals = lax.fori_loop(0, steps, step, (start, zero))
    if not weight.grouped:
        alpha, mu = (_spread(_load_row(scales_gmem.at[0, i, rows]), n) for i in (0, 1))
        y = alpha * (y - totals).astype(jnp.float32) + mu * totals.astype(jnp.float32)
    partials_smem[group] = y
    plgpu.barrier_arrive(added)

    @pl.when(group == 0)
    def _():
        scale, zero_point = load_tokens(scale_gmem), load_tokens(zero_point_gmem)
        row_sums, bias, row_steps = (
            _spread(_load_row(ref.at[rows]), n) for ref in (row_sums_gmem, bias_gmem, steps_gmem)
        )
        plgpu.barrier_wait(added)
        partials = [
            plgpu.load(partials_smem.at[i], layout=ACC, optimized=False) for i in range(config.warpgroups)
        ]
        product = row_steps * functools.reduce(jnp.add, partials)
        y = rescale(product, scale, zero_point, row_sums, bias)
        _store(y.astype(out_gmem.dtype), out_gmem, first_row)


def _load_row(ref) -> jax.Array:
    """Return a value for each weight row."""
    return plgpu.load(ref, layout=ACC.reduce(1), optimized=False)


def _spread(row: jax.Array, tokens: int) -> jax.Array:
    """Return the row's values in float32, beside each other for all tokens."""
    return plgpu.layout_cast(lax.broadcast_in_dim(row.astype(jnp.float32), (MMA_ROWS, tokens), (0,)), ACC)


def _store(y: jax.Array, out_gmem, first_row: jax.Array) -> None:
    """Write `yᵀ` for the tokens that exist."""
    t = out_gmem.shape[0]

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def put_registers(_, y, out, row_offset):
        index = ir.IndexType.get()
        offset = arith.index_cast(index, row_offset.registers.flat[0])

        def put(value, position):
            row, token = position
            row = arith.addi(row, offset)
            with utils.when(arith.cmpi(arith.CmpIPredicate.ult, token, utils.c(t, index))):
                memref.store(value, out, [token, row])

        y.foreach(put)

    put_registers(y, out_gmem, first_row)  # pyright: ignore[reportCallIssue]
