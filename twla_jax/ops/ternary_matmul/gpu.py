"""The ternary matmul on Hopper GPUs (Pallas Mosaic GPU): few tokens, bound by the weights' way from memory.

Weight rows are the rows of `mma.sync`, tokens its columns, 8 or 16; each warp unpacks its own weights in registers. K
is split between the warpgroups of a block, each with its own ring of tiles in shared memory, and added up there in a
fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.ops.ternary_matmul import gpu_prefill
from twla_jax.ops.ternary_matmul import tiles as tuning
from twla_jax.ops.ternary_matmul.gpu_unpack import operand_layout, swizzled, unpack, unpacked_order
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import pad_columns
from twla_jax.packing import PLANE

_FEW_TOKENS = 32  # more than these go to `gpu_prefill`; not measured
_COPIES = 4  # of weights, tokens, scales and sums, into each slot of a ring


def matmul(
    x: Float[Array, "t m"],
    sums: Float[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
    tiles: tuning.GpuTiles | None = None,
    interpret=None,
) -> Float[Array, "t rows"]:
    """What `reference.matmul` computes, for int8 or bf16 x."""
    t = len(x)
    planes = weight.planes
    # The copy engine swizzles 8 tokens by 128 bytes: it fills up what lies past the end, but cuts no such piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    if not jnp.issubdtype(x.dtype, jnp.integer):
        x = unpacked_order(x)
    if t > _FEW_TOKENS and tiles is None:
        return gpu_prefill.matmul(
            x, sums, scale, zero_point, weight, out_dtype=out_dtype, interpret=interpret
        )[:t]
    # A copy is a multiple of 128 bytes: two sums of 8 tokens are less.
    block = 8 if t <= 8 and planes == 4 else 16
    tiles = tiles or tuning.gpu_tiles(len(weight.codes), weight.tiles, block, planes, x.dtype.itemsize)
    scale, zero_point = (jnp.pad(v, (0, -t % block)) for v in (scale, zero_point))
    totals = sums if weight.grouped else sums.sum(-1, keepdims=True)
    totals = jnp.pad(totals, ((0, -t % block), (0, 0))).T
    x = jnp.pad(x, ((0, -t % 8 if t > 8 else 0), (0, 0)))
    n, groups, stages = tiles.rows, tiles.warpgroups, tiles.stages
    y = plgpu.kernel(
        functools.partial(_kernel, tiles=tiles, weight=weight, dtype=x.dtype),
        out_type=jax.ShapeDtypeStruct((len(x), len(weight.codes)), out_dtype),
        grid=(pl.cdiv(len(x), block), len(weight.codes) // n),
        grid_names=("tokens", "rows"),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types={
            "codes_smem": plgpu.SMEM((groups, stages, n, PLANE), jnp.uint8, transforms=swizzled(1)),
            "scales_smem": plgpu.SMEM((groups, stages, 2 * planes, n), jnp.float16),
            "x_smem": plgpu.SMEM(
                (groups, stages, block, planes * PLANE), x.dtype, transforms=swizzled(x.dtype.itemsize)
            ),
            "totals_smem": plgpu.SMEM((groups, stages, planes, block), totals.dtype),
            "parts_smem": plgpu.SMEM((groups, n, block), jnp.float32),
            "out_smem": plgpu.SMEM((block, n), out_dtype),
            "filled": plgpu.Barrier(
                num_arrivals=_COPIES if weight.grouped else 2, num_barriers=groups * stages
            ),
            "added": plgpu.Barrier(num_arrivals=groups),
        },
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Without it, each copy waits for the whole warpgroup; `_all_have_read` waits once for all.
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
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
    dtype,
):
    block, n = out_smem.shape
    planes = weight.planes
    group = lax.axis_index("warpgroup")
    tokens = pl.ds(lax.axis_index("tokens") * block, block)
    rows = pl.ds(lax.axis_index("rows") * n, n)
    codes_layout, x_layout = operand_layout(jnp.int8, wide=False), plgpu.Layout.MMA_RHS(dtype)
    layout = plgpu.Layout.MMA_ACC(dtype)
    steps = lax.div(weight.tiles - group + tiles.warpgroups - 1, tiles.warpgroups)

    def load_token(ref):
        value = plgpu.load(ref, layout=layout.reduce(0), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(value, (n, block), (1,)), layout)

    def load_row(ref):
        value = plgpu.load(ref, layout=layout.reduce(1), optimized=False).astype(jnp.float32)
        return plgpu.layout_cast(lax.broadcast_in_dim(value, (n, block), (0,)), layout)

    def fetch(step, slot):
        tile = step * tiles.warpgroups + group
        barrier = filled.at[group * tiles.stages + slot]

        def copy(source, ring):
            plgpu.copy_gmem_to_smem(source, ring.at[group, slot], barrier)

        copy(codes_gmem.at[rows, pl.ds(tile * PLANE, PLANE)], codes_smem)
        copy(x_gmem.at[tokens, pl.ds(tile * planes * PLANE, planes * PLANE)], x_smem)
        if weight.grouped:
            copy(scales_gmem.at[tile, :, rows], scales_smem)
            copy(totals_gmem.at[pl.ds(tile * planes, planes), tokens], totals_smem)

    for slot in range(tiles.stages):
        pl.when(slot < steps)(functools.partial(fetch, jnp.int32(slot), slot))
    # What the end needs is read while the first tiles are on their way.
    row_sums, bias, zero_point, scale = (
        load(ref)
        for load, ref in (
            (load_row, row_sums_gmem.at[rows]),
            (load_row, bias_gmem.at[rows]),
            (load_token, zero_point_gmem.at[tokens]),
            (load_token, scale_gmem.at[tokens]),
        )
    )
    if not weight.grouped:
        # Each warpgroup's share of Q is taken off by the first one, whose sum it is then exact in.
        total = load_token(totals_gmem.at[0, tokens])
        share = jnp.where(group == 0, total, jnp.zeros_like(total))
        alpha, mu = load_row(scales_gmem.at[0, 0, rows]), load_row(scales_gmem.at[0, 1, rows])

    def step(k, y):
        slot = lax.rem(k, jnp.int32(tiles.stages))
        plgpu.barrier_wait(filled.at[group * tiles.stages + slot])
        packed = plgpu.load(codes_smem.at[group, slot], layout=codes_layout)
        for plane in range(planes):
            x_plane = plgpu.load(x_smem.at[group, slot, :, pl.ds(plane * PLANE, PLANE)].T, layout=x_layout)
            codes = unpack(packed, plane, planes, dtype)
            if weight.grouped:
                total = load_token(totals_smem.at[group, slot, plane])
                # U = T + 1, say: an accumulator that starts at −Q ends at the sum over T.
                centred = plgpu.mma(-weight.offset * total, codes, x_plane).astype(jnp.float32)
                y += load_row(scales_smem.at[group, slot, plane]) * centred
                y += load_row(scales_smem.at[group, slot, planes + plane]) * total.astype(jnp.float32)
            else:
                y = plgpu.mma(y, codes, x_plane)
        _all_have_read()
        pl.when(k + tiles.stages < steps)(functools.partial(fetch, k + tiles.stages, slot))
        return y

    partial_dtype = jnp.float32 if weight.grouped or dtype == jnp.bfloat16 else jnp.int32
    start = plgpu.layout_cast(jnp.zeros((n, block), partial_dtype), layout)
    y = lax.fori_loop(0, steps, step, start)
    if not weight.grouped:
        y = alpha * (y - weight.offset * share).astype(jnp.float32) + mu * share.astype(jnp.float32)

    def finish(total):
        out = scale * (total - zero_point * row_sums) + bias
        out_smem.T[...] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[tokens, rows])
        plgpu.wait_smem_to_gmem(0)

    if tiles.warpgroups == 1:
        finish(y)
        return
    parts_smem[group] = y
    plgpu.barrier_arrive(added)

    @pl.when(group == 0)
    def _():
        plgpu.barrier_wait(added)
        parts = [
            plgpu.load(parts_smem.at[i], layout=layout, optimized=False) for i in range(tiles.warpgroups)
        ]
        finish(functools.reduce(jnp.add, parts))


def _all_have_read() -> None:
    """Waits until all warps of the warpgroup are here: what they have read may be overwritten."""
    plgpu.inline_mgpu()(lambda _: utils.warpgroup_barrier())()  # pyright: ignore[reportCallIssue]
