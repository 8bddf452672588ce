"""The ternary matmul on Hopper GPUs (Pallas Mosaic GPU): bf16 tokens here, few int8 tokens by `gpu_integer`, many by
`gpu_prefill`.

Tokens are the 16 rows of `mma.sync`, weight rows its columns; each warp unpacks its own weights in registers. K is
split between the warpgroups of a block, each with its own ring of tiles in shared memory, and added up there in a fixed
order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.ops.ternary_matmul import gpu_integer, gpu_prefill
from twla_jax.ops.ternary_matmul import tiles as tuning
from twla_jax.ops.ternary_matmul.gpu_unpack import unpack, unpacked_order
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import pad_columns
from twla_jax.packing import PLANE, TILE

_TOKENS = 16  # rows of mma.sync; those that are not there are neither read nor written
_COPIES = 4  # of weights, scales, tokens and their sums, into each slot of a ring


def matmul(
    x: Float[Array, "t m"],
    sums: Float[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
) -> Float[Array, "t rows"]:
    """What `reference.matmul` computes, for int8 or bf16 x."""
    if x.dtype == jnp.int8 and len(x) > tuning.FEW_TOKENS:
        return gpu_prefill.matmul(x, sums, scale, zero_point, weight, out_dtype=out_dtype)
    if x.dtype == jnp.int8:
        return gpu_integer.matmul(x, scale, zero_point, weight, out_dtype=out_dtype)
    t = len(x)
    tiles = tuning.gpu_tiles(len(weight.codes), weight.tiles)
    scale, zero_point = (jnp.pad(v, (0, -t % _TOKENS)) for v in (scale, zero_point))
    totals = sums if weight.grouped else sums.sum(-1, keepdims=True)
    totals = jnp.pad(totals, ((0, -t % _TOKENS), (0, 0))).T
    # The copy engine swizzles 8 tokens by 128 bytes: it fills up what lies past the end, but cuts no such piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    x = jnp.pad(x, ((0, -t % 8 if t > 8 else 0), (0, 0)))
    x = unpacked_order(x)
    kernel = functools.partial(_kernel, tiles=tiles, weight=weight)
    n, groups, stages = tiles.rows, tiles.warpgroups, tiles.stages
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((len(x), len(weight.codes)), out_dtype),
        grid=(pl.cdiv(len(x), _TOKENS), len(weight.codes) // n),
        grid_names=("tokens", "rows"),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types={
            "codes_smem": plgpu.SMEM((groups, stages, n, PLANE), jnp.uint8, transforms=_swizzled(1)),
            "scales_smem": plgpu.SMEM((groups, stages, 8, n), jnp.float16),
            "x_smem": plgpu.SMEM(
                (groups, stages, _TOKENS, TILE), x.dtype, transforms=_swizzled(x.dtype.itemsize)
            ),
            "totals_smem": plgpu.SMEM((groups, stages, 4, _TOKENS), totals.dtype),
            "parts_smem": plgpu.SMEM((groups, _TOKENS, n), jnp.float32),
            "out_smem": plgpu.SMEM((_TOKENS, n), out_dtype),
            "filled": plgpu.Barrier(
                num_arrivals=_COPIES if weight.grouped else 2, num_barriers=groups * stages
            ),
            "added": plgpu.Barrier(num_arrivals=groups),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(weight.codes, weight.scales, weight.row_sums, weight.bias, x, totals, scale, zero_point)
    return y[:t]


def _kernel(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    x_gmem,
    totals_gmem,
    scale_gmem,
    zero_point_gmem,
    out_gmem,
    *,
    codes_smem,
    scales_smem,
    x_smem,
    totals_smem,
    parts_smem,
    out_smem,
    filled,
    added,
    tiles: tuning.GpuTiles,
    weight: KernelWeight,
):
    n = tiles.rows
    group = lax.axis_index("warpgroup")
    tokens = pl.ds(lax.axis_index("tokens") * _TOKENS, _TOKENS)
    rows = pl.ds(lax.axis_index("rows") * n, n)
    x_layout = plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=1)
    codes_layout = plgpu.Layout.MMA_RHS(jnp.int8, m_warps=1)
    layout = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=1)
    steps = lax.div(weight.tiles - group + tiles.warpgroups - 1, tiles.warpgroups)

    def load_token(ref):
        value = plgpu.load(ref, layout=layout.reduce(1), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(value, (_TOKENS, n), (0,)), layout)

    def load_row(ref):
        value = plgpu.load(ref, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
        return plgpu.layout_cast(lax.broadcast_in_dim(value, (_TOKENS, n), (1,)), layout)

    def fetch(step, slot):
        tile = step * tiles.warpgroups + group
        barrier = filled.at[group * tiles.stages + slot]

        def copy(source, ring):
            plgpu.copy_gmem_to_smem(source, ring.at[group, slot], barrier)

        copy(codes_gmem.at[rows, pl.ds(tile * PLANE, PLANE)], codes_smem)
        copy(x_gmem.at[tokens, pl.ds(tile * TILE, TILE)], x_smem)
        if weight.grouped:
            copy(scales_gmem.at[tile, :, rows], scales_smem)
            copy(totals_gmem.at[pl.ds(tile * 4, 4), tokens], totals_smem)

    for slot in range(tiles.stages):
        pl.when(slot < steps)(functools.partial(fetch, jnp.int32(slot), slot))

    def step(k, y):
        slot = lax.rem(k, jnp.int32(tiles.stages))
        plgpu.barrier_wait(filled.at[group * tiles.stages + slot])
        packed = plgpu.load(codes_smem.at[group, slot].T, layout=codes_layout)
        for plane in range(4):
            x_plane = plgpu.load(x_smem.at[group, slot, :, pl.ds(plane * PLANE, PLANE)], layout=x_layout)
            codes = unpack(packed, plane, n)
            if weight.grouped:
                total = load_token(totals_smem.at[group, slot, plane])
                # U = T + 1: an accumulator that starts at −Q ends at the sum over T.
                centred = plgpu.mma(-total, x_plane, codes)
                y += load_row(scales_smem.at[group, slot, plane]) * centred
                y += load_row(scales_smem.at[group, slot, 4 + plane]) * total
            else:
                y = plgpu.mma(y, x_plane, codes)
        pl.when(k + tiles.stages < steps)(functools.partial(fetch, k + tiles.stages, slot))
        return y

    start = plgpu.layout_cast(jnp.zeros((_TOKENS, n), jnp.float32), layout)
    y = lax.fori_loop(0, steps, step, start)
    if not weight.grouped:
        # The first warpgroup takes off the tokens' sums for all.
        total = load_token(totals_gmem.at[0, tokens])
        share = jnp.where(group == 0, total, jnp.zeros_like(total))
        alpha, mu = load_row(scales_gmem.at[0, 0, rows]), load_row(scales_gmem.at[0, 1, rows])
        y = alpha * (y - share) + mu * share
    parts_smem[group] = y
    plgpu.barrier_arrive(added)

    @pl.when(group == 0)
    def _():
        plgpu.barrier_wait(added)
        parts = [
            plgpu.load(parts_smem.at[i], layout=layout, optimized=False) for i in range(tiles.warpgroups)
        ]
        correction = load_token(zero_point_gmem.at[tokens]) * load_row(row_sums_gmem.at[rows])
        total = functools.reduce(jnp.add, parts) - correction
        out = load_token(scale_gmem.at[tokens]) * total + load_row(bias_gmem.at[rows])
        out_smem[...] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[tokens, rows])
        plgpu.wait_smem_to_gmem(0)


def _swizzled(itemsize: int):
    tiling = plgpu.TilingTransform((8, 128 // itemsize))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
