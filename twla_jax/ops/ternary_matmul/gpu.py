"""The ternary matmul on Hopper GPUs (Pallas Mosaic GPU): few tokens, bound by the weights' way from memory.

Weight rows are the 64 rows of four `mma.sync`, a warp's 16 each, unpacked in its registers, and tokens their columns. K
is split between the warpgroups of a block, each with its own ring of tiles in shared memory, and added up there in a
fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.ops.ternary_matmul import tiles as tuning
from twla_jax.ops.ternary_matmul.gpu_unpack import unpack, unpacked_order
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import pad_columns
from twla_jax.packing import PLANE, TILE


def matmul(
    x: Float[Array, "t m"],
    sums: Float[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
    tiles: tuning.GpuTiles | None = None,
) -> Float[Array, "t rows"]:
    """What `reference.matmul` computes, for int8 or bf16 x, whose sums it takes itself."""
    del sums
    t, itemsize = len(x), x.dtype.itemsize
    tiles = tiles or tuning.gpu_tiles(t, len(weight.codes), weight.tiles, itemsize)
    # The copy engine swizzles 8 tokens by 128 bytes: it fills up what lies past the end, but cuts no such piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    x = jnp.pad(x, ((0, -t % 8 if t > 8 else 0), (0, 0)))
    if not jnp.issubdtype(x.dtype, jnp.integer):
        x = unpacked_order(x)
    n, tokens, groups, stages = tiles.rows, tiles.tokens, tiles.warpgroups, tiles.stages
    return plgpu.kernel(
        functools.partial(_kernel, tiles=tiles, weight=weight, dtype=x.dtype),
        out_type=jax.ShapeDtypeStruct((t, len(weight.codes)), out_dtype),
        grid=(pl.cdiv(t, tokens), len(weight.codes) // n),
        grid_names=("tokens", "rows"),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types={
            "codes_smem": plgpu.SMEM((groups, stages, n, PLANE), jnp.uint8, transforms=_swizzled(1)),
            "scales_smem": plgpu.SMEM((groups, stages, 8, n), jnp.float16),
            "x_smem": plgpu.SMEM((groups, stages, tokens, TILE), x.dtype, transforms=_swizzled(itemsize)),
            "parts_smem": plgpu.SMEM((groups, n, tokens), jnp.float32),
            "filled": plgpu.Barrier(num_arrivals=3 if weight.grouped else 2, num_barriers=groups * stages),
            "added": plgpu.Barrier(num_arrivals=groups),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(weight.codes, weight.scales, weight.row_sums, weight.bias, x, scale, zero_point)


def _kernel(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    x_gmem,
    scale_gmem,
    zero_point_gmem,
    out_gmem,
    *,
    codes_smem,
    scales_smem,
    x_smem,
    parts_smem,
    filled,
    added,
    tiles: tuning.GpuTiles,
    weight: KernelWeight,
    dtype,
):
    n, tokens = tiles.rows, tiles.tokens
    group = lax.axis_index("warpgroup")
    first = lax.axis_index("tokens") * tokens
    rows = pl.ds(lax.axis_index("rows") * n, n)
    layout = plgpu.Layout.MMA_ACC(dtype)
    steps = lax.div(weight.tiles - group + tiles.warpgroups - 1, tiles.warpgroups)

    def row_vector(ref):
        return plgpu.load(ref, layout=layout.reduce(1), optimized=False).astype(jnp.float32)

    def spread(value):
        return plgpu.layout_cast(lax.broadcast_in_dim(value, (n, tokens), (0,)), layout)

    def filled_with(value, shape, dtype, layout):
        return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)

    def fetch(step, slot):
        tile = step * tiles.warpgroups + group
        barrier = filled.at[group * tiles.stages + slot]

        def copy(source, ring):
            plgpu.copy_gmem_to_smem(source, ring.at[group, slot], barrier)

        copy(codes_gmem.at[rows, pl.ds(tile * PLANE, PLANE)], codes_smem)
        copy(x_gmem.at[pl.ds(first, tokens), pl.ds(tile * TILE, TILE)], x_smem)
        if weight.grouped:
            copy(scales_gmem.at[tile, :, rows], scales_smem)

    for slot in range(tiles.stages):
        pl.when(slot < steps)(functools.partial(fetch, jnp.int32(slot), slot))

    sum_dtype = jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32
    zero = filled_with(0, (n, tokens), sum_dtype, layout)
    # As left operand of a product, what takes the sums of x to every row.
    ones = filled_with(1, (n, PLANE), dtype, plgpu.Layout.MMA_LHS(dtype))

    def step(k, carry):
        y, share = carry
        slot = lax.rem(k, jnp.int32(tiles.stages))
        plgpu.barrier_wait(filled.at[group * tiles.stages + slot])
        packed = plgpu.load(codes_smem.at[group, slot], layout=plgpu.Layout.MMA_LHS(jnp.int8))
        for plane in range(4):
            x_plane = plgpu.load(
                x_smem.at[group, slot, :, pl.ds(plane * PLANE, PLANE)].T, layout=plgpu.Layout.MMA_RHS(dtype)
            )
            codes = unpack(packed, plane, n, dtype)
            if weight.grouped:
                acc, total = plgpu.mma(zero, codes, x_plane), plgpu.mma(zero, ones, x_plane)
                alpha = row_vector(scales_smem.at[group, slot, plane])
                offset = row_vector(scales_smem.at[group, slot, 4 + plane]) - alpha  # as U = T + 1
                y += spread(alpha) * acc.astype(jnp.float32) + spread(offset) * total.astype(jnp.float32)
            else:
                y, share = plgpu.mma(y, codes, x_plane), plgpu.mma(share, ones, x_plane)
        pl.when(k + tiles.stages < steps)(functools.partial(fetch, k + tiles.stages, slot))
        return y, share

    start = filled_with(0, (n, tokens), jnp.float32, layout) if weight.grouped else zero
    y, share = lax.fori_loop(0, steps, step, (start, zero))
    if not weight.grouped:
        alpha = row_vector(scales_gmem.at[0, 0, rows])
        offset = row_vector(scales_gmem.at[0, 1, rows]) - alpha
        y = spread(alpha) * y.astype(jnp.float32) + spread(offset) * share.astype(jnp.float32)
    parts_smem[group] = y
    plgpu.barrier_arrive(added)
    row_sums, bias = row_vector(row_sums_gmem.at[rows]), row_vector(bias_gmem.at[rows])
    plgpu.barrier_wait(added)

    def finish(i, _):
        token = i * tiles.warpgroups + group
        total = functools.reduce(
            jnp.add, [row_vector(parts_smem.at[part, :, token]) for part in range(tiles.warpgroups)]
        )
        out = scale_gmem[first + token] * (total - zero_point_gmem[first + token] * row_sums) + bias
        out_gmem[first + token, rows] = out.astype(out_gmem.dtype)
        return _

    real = jnp.minimum(out_gmem.shape[0] - first, tokens)
    lax.fori_loop(0, lax.div(real - group + tiles.warpgroups - 1, tiles.warpgroups), finish, None)


def _swizzled(itemsize: int):
    tiling = plgpu.TilingTransform((8, 128 // itemsize))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
