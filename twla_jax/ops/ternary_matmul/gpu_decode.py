"""The integer ternary matmul on Hopper GPUs for few tokens: bound by the weights' way from memory.

Weight rows are the rows of `mma.sync`, tokens its columns, so that no more than eight tokens are multiplied where there
are no more. K is split between the warpgroups of a block, each with its own ring of tiles in shared memory, and added
up there in a fixed order. Several blocks share a multiprocessor: while one waits for its tiles, another multiplies.
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

from twla_jax.ops.ternary_matmul import tiles as tuning
from twla_jax.ops.ternary_matmul.gpu_unpack import unpack_rows
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import pad_columns
from twla_jax.packing import PLANE, TILE

_ROWS = 64  # those of the four warps of one `mma.sync`

_LHS, _RHS, _ACC = (
    kind(jnp.int8) for kind in (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
)


def matmul(
    x: Int8[Array, "t m"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
    tiles: tuning.DecodeTiles | None = None,
) -> Float[Array, "t rows"]:
    """What `reference.matmul` computes, for int8 x. Reads and writes tokens as they are: there is nothing to fill up."""
    t = len(x)
    tiles = tiles or tuning.decode_tiles(t, len(weight.codes), weight.tiles)
    # The copy engine swizzles 8 tokens by 128 bytes: it fills up what lies past the end, but cuts no such piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    x = jnp.pad(x, ((0, -t % 8 if t > 8 else 0), (0, 0)))
    n, rows, groups, stages = tiles.tokens, tiles.rows, tiles.warpgroups, tiles.stages
    return plgpu.kernel(
        functools.partial(_kernel, t=t, tiles=tiles, weight=weight),
        out_type=jax.ShapeDtypeStruct((t, len(weight.codes)), out_dtype),
        grid=(pl.cdiv(t, n), len(weight.codes) // rows),
        grid_names=("tokens", "rows"),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types={
            "codes_smem": plgpu.SMEM((groups, stages, rows, PLANE), jnp.uint8, transforms=_SWIZZLED),
            "x_smem": plgpu.SMEM((groups, stages, n, TILE), jnp.int8, transforms=_SWIZZLED),
            "scales_smem": plgpu.SMEM((groups, stages, 8, rows), jnp.float16),
            "parts_smem": plgpu.SMEM((groups, rows, n), jnp.float32),
            "filled": plgpu.Barrier(
                num_arrivals=3 if weight.grouped else 2, num_barriers=groups * stages
            ),
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
    x_smem,
    scales_smem,
    parts_smem,
    filled,
    added,
    t: int,
    tiles: tuning.DecodeTiles,
    weight: KernelWeight,
):
    n, halves = tiles.tokens, range(tiles.rows // _ROWS)
    group = lax.axis_index("warpgroup")
    first_token, first_row = lax.axis_index("tokens") * n, lax.axis_index("rows") * tiles.rows
    tokens, rows = pl.ds(first_token, n), pl.ds(first_row, tiles.rows)
    steps = lax.div(weight.tiles - group + tiles.warpgroups - 1, tiles.warpgroups)

    def of_half(half):
        return pl.ds(half * _ROWS, _ROWS)

    def load_row(ref):
        row = plgpu.load(ref, layout=_ACC.reduce(1), optimized=False).astype(jnp.float32)
        return plgpu.layout_cast(lax.broadcast_in_dim(row, (_ROWS, n), (0,)), _ACC)

    def load_tokens(ref):
        column = plgpu.broadcasted_iota(jnp.int32, (_ROWS, n), 1, layout=_ACC)
        value = plgpu.layout_cast(jnp.zeros((_ROWS, n), jnp.float32), _ACC)
        for i in range(min(t, n)):
            value = jnp.where(column == i, ref[jnp.minimum(first_token + i, t - 1)], value)
        return value

    def fetch(step, slot):
        tile = step * tiles.warpgroups + group
        barrier = filled.at[group * tiles.stages + slot]

        def copy(source, ring):
            plgpu.copy_gmem_to_smem(source, ring.at[group, slot], barrier)

        copy(codes_gmem.at[rows, pl.ds(tile * PLANE, PLANE)], codes_smem)
        copy(x_gmem.at[tokens, pl.ds(tile * TILE, TILE)], x_smem)
        if weight.grouped:
            copy(scales_gmem.at[tile, :, rows], scales_smem)

    for slot in range(tiles.stages):
        pl.when(slot < steps)(functools.partial(fetch, jnp.int32(slot), slot))

    ones = plgpu.layout_cast(jnp.ones((_ROWS, PLANE), jnp.int8), _LHS)
    zero = plgpu.layout_cast(jnp.zeros((_ROWS, n), jnp.int32), _ACC)

    def step(k, carry):
        ys, totals = list(carry[0]), carry[1]
        slot = lax.rem(k, jnp.int32(tiles.stages))
        plgpu.barrier_wait(filled.at[group * tiles.stages + slot])
        packed = [plgpu.load(codes_smem.at[group, slot, of_half(half)], layout=_LHS) for half in halves]
        for plane in range(4):
            x_plane = plgpu.load(x_smem.at[group, slot, :, pl.ds(plane * PLANE, PLANE)].T, layout=_RHS)
            if not weight.grouped:
                totals = plgpu.mma(totals, ones, x_plane)
                for half in halves:
                    codes, _ = unpack_rows(packed[half], plane, exact=True)
                    ys[half] = plgpu.mma(ys[half], codes, x_plane)
                continue
            # Every row of this product is the tokens' sum of codes: U = T + 1 and μ need it.
            total = plgpu.mma(zero, ones, x_plane).astype(jnp.float32)
            for half in halves:
                codes, factor = unpack_rows(packed[half], plane)
                product = plgpu.mma(zero, codes, x_plane).astype(jnp.float32)
                alpha, mu = (
                    load_row(scales_smem.at[group, slot, i, of_half(half)]) for i in (plane, 4 + plane)
                )
                ys[half] += (alpha * (1 / factor)) * product + (mu - alpha) * total
        pl.when(k + tiles.stages < steps)(functools.partial(fetch, k + tiles.stages, slot))
        return tuple(ys), totals

    start = zero.astype(jnp.float32) if weight.grouped else zero
    ys, totals = lax.fori_loop(0, steps, step, (tuple(start for _ in halves), zero))
    for half in halves:
        y = ys[half]
        if not weight.grouped:
            alpha, mu = (load_row(scales_gmem.at[0, i, pl.ds(first_row + half * _ROWS, _ROWS)]) for i in (0, 1))
            y = alpha * (y - totals).astype(jnp.float32) + mu * totals.astype(jnp.float32)
        parts_smem[group, of_half(half)] = y
    plgpu.barrier_arrive(added)

    @pl.when(group == 0)
    def _():
        scale, zero_point = load_tokens(scale_gmem), load_tokens(zero_point_gmem)
        plgpu.barrier_wait(added)
        for half in halves:
            here = pl.ds(first_row + half * _ROWS, _ROWS)
            parts = [
                plgpu.load(parts_smem.at[i, of_half(half)], layout=_ACC, optimized=False)
                for i in range(tiles.warpgroups)
            ]
            y = functools.reduce(jnp.add, parts) - zero_point * load_row(row_sums_gmem.at[here])
            _store(scale * y + load_row(bias_gmem.at[here]), out_gmem, first_token, first_row + half * _ROWS)


def _store(y: jax.Array, out_gmem, first_token: jax.Array, first_row: jax.Array) -> None:
    """Writes `yᵀ`, of which only the tokens that there are, in the type of `out_gmem`."""
    t = out_gmem.shape[0]

    @plgpu.inline_mgpu(arg_types=(_ACC, plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def store(_, y, out, token_offset, row_offset):
        index = ir.IndexType.get()
        offsets = [arith.index_cast(index, offset.registers.flat[0]) for offset in (token_offset, row_offset)]

        def put(value, position):
            row, token = position
            token, row = arith.addi(token, offsets[0]), arith.addi(row, offsets[1])
            with utils.when(arith.cmpi(arith.CmpIPredicate.ult, token, utils.c(t, index))):
                memref.store(value, out, [token, row])

        y.foreach(put)

    store(y.astype(out_gmem.dtype), out_gmem, first_token, first_row)


_SWIZZLED = (
    plgpu.TilingTransform((8, 128)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
