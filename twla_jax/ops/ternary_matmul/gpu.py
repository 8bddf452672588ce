"""Multiplies by packed weights on Hopper GPUs (Pallas Mosaic GPU): bf16 tokens here, int8 tokens in other modules.

int8 tokens, of ternary weights alone, go to `gpu_few`, `gpu_mma` and `gpu_many`, in this order as they become more.

Tokens are the 16 rows of `mma.sync`, weight rows its columns; padding tokens are neither read nor written. Each warp
unpacks its own weights in registers. K is split between the warpgroups of a block, each with its own ring of tiles in
shared memory, and added up there in a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8, Int32

from twla_jax.core.packing import PLANE
from twla_jax.ops.hopper.swizzle import swizzle_transforms
from twla_jax.ops.ternary_matmul import gpu_few, gpu_many, gpu_mma, tile_configs
from twla_jax.ops.ternary_matmul.gpu_unpack import unpack, unpacked_order
from twla_jax.ops.ternary_matmul.reference import in_two_parts
from twla_jax.ops.ternary_matmul.weight import (
    KernelWeight,
    PackedWeight,
    as_type,
    fields_of_pair,
    shapes_of_one,
)
from twla_jax.ops.tokens import group_sums, pad_columns

_COPIES = 4  # of weights, scales, tokens and their sums, into each slot of a ring


def matmul(
    x: Float[Array, "t m"],
    sums: Float[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    residual: Float[Array, "t n"] | None = None,
    *,
    out_dtype,
) -> Float[Array, "t n"]:
    """Return what `reference.matmul` computes, for int8 or bf16 x."""
    if x.dtype == jnp.int8 and gpu_few.obstacle(len(x), weight) is None:
        return gpu_few.matmul(x, scale, zero_point, weight, residual, out_dtype=out_dtype)
    if x.dtype == jnp.int8 and gpu_many.is_faster(len(x), weight, out_dtype):
        return gpu_many.matmul(x, sums, scale, zero_point, weight, residual, out_dtype=out_dtype)
    if x.dtype == jnp.int8:
        y = gpu_mma.matmul(x, scale, zero_point, weight, out_dtype=out_dtype)
    else:  # Floats have no scale and no zero point.
        y = product(x, sums, weight, (weight.steps, weight.bias), out_dtype=out_dtype)
    return weight.finished(y, residual)


def wide_matmul(
    x: Int8[Array, "2t m"],
    sums: Int32[Array, "2t groups"],
    scale: Float32[Array, " 2t"],
    zero_point: Float32[Array, " 2t"],
    weight: KernelWeight,
    residual: Float[Array, "t n"] | None = None,
    *,
    out_dtype,
) -> Float[Array, "t n"]:
    """Return what `reference.in_two_parts(reference.matmul)` computes, for tokens of 16 bits in two int8 codes."""
    operands = x, sums, scale, zero_point, weight, residual
    if tile_configs.FEW_TOKENS < len(x) <= gpu_many.MOST_WIDE:
        return gpu_many.matmul(*operands, out_dtype=out_dtype, wide=True)
    return in_two_parts(matmul)(*operands, out_dtype=out_dtype)


def product(
    x: Float[Array, "t m"],
    sums: Float[Array, "t groups"],
    weight: PackedWeight,
    by_row: tuple[Float32[Array, " rows"], Float32[Array, " rows"]] | tuple[()] = (),
    *,
    out_dtype,
    config: tile_configs.GpuTileConfig | None = None,
    experts: Int32[Array, " blocks"] | None = None,
) -> Float[Array, "t rows"]:
    """Return what `reference.product` computes, for bf16 x; with steps and biases `by_row`, what `matmul` does.

    With `experts`, arrays of the weight have a leading axis of experts, and each block of `config.tokens` has its own.
    """
    codes, scales, of_block = weight.codes, weight.scales, [] if experts is None else [experts]
    if experts is not None:
        weight = shapes_of_one(weight)
    scales = scales if weight.paired else as_type(scales, jnp.float16)
    t, planes = len(x), weight.planes
    config = config or tile_configs.gpu_tile_config(t, weight.rows, weight.column_tiles, planes)
    n, block, groups, stages = config.rows, config.tokens, config.warpgroups, config.stages
    del sums  # Padding the sums would take a kernel; padding tokens before they are summed takes none.
    totals = group_sums(jnp.pad(x, ((0, -t % block), (0, 0)))).T
    totals = totals if weight.grouped else totals.sum(0, keepdims=True)
    # The copy engine swizzles pieces of 8 tokens by 128 bytes: it pads past the end, but cannot cut a piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    x = jnp.pad(x, ((0, -t % 8 if t > 8 else 0), (0, 0)))
    x = unpacked_order(x)
    kernel = functools.partial(_kernel, config=config, weight=weight, of_experts=experts is not None)
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((len(x), weight.rows), out_dtype),
        # Blocks of the same rows run at the same time, and only the first of them reads its weights from memory.
        grid=(weight.rows // n, pl.cdiv(len(x), block)),
        grid_names=("rows", "tokens"),
        num_threads=groups,
        thread_name="warpgroup",
        kernel_name="packed_matmul",
        scratch_types={
            "codes_smem": plgpu.SMEM((groups, stages, n, PLANE), jnp.uint8, transforms=swizzle_transforms(1)),
            "scales_smem": plgpu.SMEM((groups, stages, weight.parameters, n), scales.dtype),
            "x_smem": plgpu.SMEM(
                (groups, stages, block, planes * PLANE),
                x.dtype,
                transforms=swizzle_transforms(x.dtype.itemsize),
            ),
            "totals_smem": plgpu.SMEM((groups, stages, _total_rows(planes), block), totals.dtype),
            "partials_smem": plgpu.SMEM((groups, block, n), jnp.float32),
            "out_smem": plgpu.SMEM((block, n), out_dtype),
            "filled": plgpu.Barrier(
                num_arrivals=_COPIES if weight.grouped else 2, num_barriers=groups * stages
            ),
            "added": plgpu.Barrier(num_arrivals=groups),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(codes, scales, x, totals, *by_row, *of_block)
    return y[:t]


def _kernel(
    codes_gmem,
    scales_gmem,
    x_gmem,
    totals_gmem,
    *more_gmem,
    codes_smem,
    scales_smem,
    x_smem,
    totals_smem,
    partials_smem,
    out_smem,
    filled,
    added,
    config: tile_configs.GpuTileConfig,
    weight: PackedWeight,
    of_experts: bool,
):
    *by_row_gmem, out_gmem = more_gmem
    if of_experts:
        expert = by_row_gmem.pop()[lax.axis_index("tokens")]
        codes_gmem, scales_gmem = codes_gmem.at[expert], scales_gmem.at[expert]
    n, block, planes = config.rows, config.tokens, weight.planes
    group = lax.axis_index("warpgroup")
    tokens = pl.ds(lax.axis_index("tokens") * block, block)
    rows = pl.ds(lax.axis_index("rows") * n, n)
    x_layout = plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=1)
    codes_layout = plgpu.Layout.MMA_RHS(jnp.int8, m_warps=1)
    layout = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=1)
    steps = lax.div(weight.column_tiles - group + config.warpgroups - 1, config.warpgroups)

    def load_token(ref):
        value = plgpu.load(ref, layout=layout.reduce(1), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(value, (block, n), (0,)), layout)

    def load_row(ref):
        return plgpu.load(ref, layout=layout.reduce(0), optimized=False)

    def spread(value):
        value = value.astype(jnp.float32)
        return plgpu.layout_cast(lax.broadcast_in_dim(value, (block, n), (1,)), layout)

    def load_scales(ref, plane):
        if weight.paired:
            return map(spread, fields_of_pair(load_row(ref.at[plane]).astype(jnp.int32)))
        return (spread(load_row(ref.at[i])) for i in (plane, planes + plane))

    def fetch(step, slot):
        tile = step * config.warpgroups + group
        barrier = filled.at[group * config.stages + slot]

        def copy(source, ring):
            plgpu.copy_gmem_to_smem(source, ring.at[group, slot], barrier)

        copy(codes_gmem.at[tile, rows], codes_smem)
        copy(x_gmem.at[tokens, pl.ds(tile * planes * PLANE, planes * PLANE)], x_smem)
        if weight.grouped:
            copy(scales_gmem.at[tile, :, rows], scales_smem)
            copy(totals_gmem.at[pl.ds(tile * planes, _total_rows(planes)), tokens], totals_smem)

    zeros = plgpu.layout_cast(jnp.zeros((block, n), jnp.float32), layout)

    for slot in range(config.stages):
        pl.when(slot < steps)(functools.partial(fetch, jnp.int32(slot), slot))

    def step(k, y):
        slot = lax.rem(k, jnp.int32(config.stages))
        plgpu.barrier_wait(filled.at[group * config.stages + slot])
        packed = plgpu.load(codes_smem.at[group, slot].T, layout=codes_layout)
        for plane in range(planes):
            x_plane = plgpu.load(x_smem.at[group, slot, :, pl.ds(plane * PLANE, PLANE)], layout=x_layout)
            codes = unpack(packed, plane, n, bits=weight.bits, offset=weight.offset)
            if weight.grouped:
                total = load_token(totals_smem.at[group, slot, plane])
                alpha, mu = load_scales(scales_smem.at[group, slot], plane)
                acc = plgpu.mma(zeros, x_plane, codes)
                y += alpha * (acc + mu * total) if weight.relative else alpha * acc + mu * total
            else:
                y = plgpu.mma(y, x_plane, codes)
        pl.when(k + config.stages < steps)(functools.partial(fetch, k + config.stages, slot))
        return y

    y = lax.fori_loop(0, steps, step, zeros)
    if not weight.grouped:
        # The first warpgroup adds the tokens' sums for all.
        total = load_token(totals_gmem.at[0, tokens])
        share = jnp.where(group == 0, total, jnp.zeros_like(total))
        alpha, mu = (spread(load_row(scales_gmem.at[0, i, rows])) for i in range(2))
        y = alpha * y + mu * share
    partials_smem[group] = y
    plgpu.barrier_arrive(added)

    @pl.when(group == 0)
    def _():
        plgpu.barrier_wait(added)
        partials = [
            plgpu.load(partials_smem.at[i], layout=layout, optimized=False) for i in range(config.warpgroups)
        ]
        out = functools.reduce(jnp.add, partials)
        if by_row_gmem:
            steps, bias = (spread(load_row(ref.at[rows])) for ref in by_row_gmem)
            out = out * steps + bias
        out_smem[...] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[tokens, rows])
        plgpu.wait_smem_to_gmem(0)


def _total_rows(planes: int) -> int:
    """Return how many planes' sums are copied at a time: those of one are less than the 128 bytes of a slot."""
    return max(2, planes)
