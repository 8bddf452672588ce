"""Two-bit weights times many int8 tokens on Hopper GPUs (Pallas Mosaic GPU), bound by the tensor cores.

A block computes 128 weight rows, 64 to each of two warpgroups, which unpack them in registers as the left operand of
`wgmma`; a third warpgroup keeps a ring of tiles filled, across the outputs that a block computes one after the other.
While one warpgroup scales what it has summed, the other multiplies. Blocks of a cluster share tokens, which are read
once for all.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float16, Float32, Int8, Int32

from twla_jax.ops.ternary_matmul import tiles as tuning
from twla_jax.ops.ternary_matmul.gpu_unpack import unpack_rows
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import pad_columns
from twla_jax.packing import PLANE, TILE

_WARPGROUPS = 2  # that multiply; one more copies
_ROWS = 64  # of a warpgroup: those of `wgmma`
_BLOCK_ROWS = _WARPGROUPS * _ROWS
_TOKENS = 128  # of a block: what registers hold of sums, in int32 and in float32
_STAGES = 2  # tiles of 512 columns of weights under way
_HALVES = 2 * _STAGES  # of tiles of tokens, freed one by one
_LAYOUT = plgpu.Layout.WGMMA


def matmul(
    x: Int8[Array, "t m"],
    sums: Int32[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
    cluster: int = 2,
) -> Float[Array, "t rows"]:
    """What `reference.matmul` computes, for int8 x."""
    t = len(x)
    # The copy engine swizzles 8 tokens by 128 bytes: it fills up what lies past the end, but cuts no such piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    totals = _halves(sums) if weight.grouped else sums.sum(-1).astype(jnp.float32)
    x = jnp.pad(x, ((0, -t % 8), (0, 0)))
    totals = jnp.pad(totals, ((0, -t % 8),) + ((0, 0),) * (totals.ndim - 1))
    outputs = pl.cdiv(len(weight.codes), _BLOCK_ROWS * cluster) * pl.cdiv(t, _TOKENS)
    itemsize = jnp.dtype(out_dtype).itemsize
    scratch = {
        "codes_smem": plgpu.SMEM((_STAGES, _BLOCK_ROWS, PLANE), jnp.uint8, transforms=_swizzled(128, 1)),
        "x_smem": plgpu.SMEM((_HALVES, _TOKENS, TILE // 2), jnp.int8, transforms=_swizzled(128, 1)),
        "alpha_smem": plgpu.SMEM((_STAGES, 4, _BLOCK_ROWS), jnp.float16),
        "scales_smem": plgpu.SMEM((_STAGES, 16, _BLOCK_ROWS), jnp.float16, transforms=_swizzled(32, 2)),
        "totals_smem": plgpu.SMEM((_STAGES, _TOKENS, 16), jnp.float16, transforms=_swizzled(32, 2)),
        "token_smem": plgpu.SMEM((_WARPGROUPS, 3, _TOKENS), jnp.float32),
        "row_smem": plgpu.SMEM((_WARPGROUPS, 2, _ROWS), jnp.float32),
        "row_scales_smem": plgpu.SMEM((_WARPGROUPS, 2, _ROWS), jnp.float16),
        "out_smem": plgpu.SMEM(
            (_WARPGROUPS, _TOKENS * 2 // itemsize, _ROWS), out_dtype, transforms=_swizzled(128, itemsize)
        ),
        "filled": plgpu.Barrier(num_arrivals=5 if weight.grouped else 1, num_barriers=_STAGES),
        "freed": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        "x_filled": plgpu.Barrier(num_barriers=_HALVES),
        "x_freed": plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=_WARPGROUPS, num_barriers=_HALVES
        ),
        "loaded": plgpu.Barrier(num_arrivals=4 if weight.grouped else 7, num_barriers=_WARPGROUPS),
    }
    y = plgpu.kernel(
        functools.partial(_kernel, outputs=outputs, cluster=cluster, weight=weight),
        out_type=jax.ShapeDtypeStruct((len(x), len(weight.codes)), out_dtype),
        grid=(min(outputs, tuning.STREAMING_MULTIPROCESSORS // cluster),),
        grid_names=("block",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(weight.codes, weight.scales, weight.row_sums, weight.bias, x, totals, scale, zero_point)
    return y[:t]


def _halves(sums: Int32[Array, "t groups"]) -> Float16[Array, "t factors"]:
    """What α and μ of a tile are multiplied with: the groups' sums −Q and Q, each in two parts that float16 holds."""
    upper = (sums + 64) // 128 * 128
    parts = [part.reshape(len(sums), -1, 4) for part in (-upper, upper, upper - sums, sums - upper)]
    return jnp.concatenate(parts, axis=-1).reshape(len(sums), -1).astype(jnp.float16)


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
    x_smem,
    alpha_smem,
    scales_smem,
    totals_smem,
    token_smem,
    row_smem,
    row_scales_smem,
    out_smem,
    filled,
    freed,
    x_filled,
    x_freed,
    loaded,
    outputs: int,
    cluster: int,
    weight: KernelWeight,
):
    steps = weight.tiles
    group = lax.axis_index("warpgroup")
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    mine = lax.div(outputs - block + blocks - 1, blocks)

    def place(i):
        """First token and first row of this block's output i."""
        tokens = pl.cdiv(out_gmem.shape[0], _TOKENS)
        output = block + i * blocks
        rows = lax.div(output, tokens) * cluster + lax.axis_index("cluster")
        return lax.rem(output, tokens) * _TOKENS, rows * _BLOCK_ROWS

    @pl.when(group == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, mine * steps)
        def _(step):
            first_token, first_row = place(lax.div(step, steps))
            tile, slot = lax.rem(step, steps), lax.rem(step, _STAGES)
            tokens, rows = pl.ds(first_token, _TOKENS), pl.ds(first_row, _BLOCK_ROWS)
            pl.when(step >= _STAGES)(lambda: plgpu.barrier_wait(freed.at[slot]))

            def copy(source, target):
                plgpu.copy_gmem_to_smem(source, target, filled.at[slot])

            copy(codes_gmem.at[rows, pl.ds(tile * PLANE, PLANE)], codes_smem.at[slot])
            if weight.grouped:
                copy(totals_gmem.at[tokens, pl.ds(tile * 16, 16)], totals_smem.at[slot])
                copy(scales_gmem.at[tile, pl.ds(0, 4), rows], alpha_smem.at[slot])
                for half in range(2):
                    copy(scales_gmem.at[tile, :, rows], scales_smem.at[slot, pl.ds(8 * half, 8)])
            for half in range(2):
                x_step, first = 2 * step + half, tile * TILE + half * (TILE // 2)
                x_slot = 2 * slot + half
                pl.when(x_step >= _HALVES)(lambda x_slot=x_slot: plgpu.barrier_wait(x_freed.at[x_slot]))
                source = x_gmem.at[tokens, pl.ds(first, TILE // 2)]
                plgpu.copy_gmem_to_smem(
                    source, x_smem.at[x_slot], x_filled.at[x_slot], collective_axes="cluster"
                )

        # Other blocks of the cluster must be done with this one's memory before it ends.
        for barrier, slots, last in ((freed, _STAGES, mine * steps), (x_freed, _HALVES, 2 * mine * steps)):

            @pl.loop(jnp.maximum(0, last - slots), last)
            def _(step, barrier=barrier, slots=slots):
                plgpu.barrier_wait(barrier.at[lax.rem(step, jnp.int32(slots))])

    @pl.when(group < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        of_group = pl.ds(group * _ROWS, _ROWS)

        def load_token(i):
            value = plgpu.load(token_smem.at[group, i], layout=_LAYOUT.reduce(0), optimized=False)
            return plgpu.layout_cast(lax.broadcast_in_dim(value, (_ROWS, _TOKENS), (1,)), _LAYOUT)

        def load_row(ref):
            return plgpu.load(ref, layout=_LAYOUT.reduce(1), optimized=False).astype(jnp.float32)

        def spread(row):
            return plgpu.layout_cast(lax.broadcast_in_dim(row, (_ROWS, _TOKENS), (0,)), _LAYOUT)

        def load_codes(slot):
            return plgpu.load(codes_smem.at[slot, of_group], layout=plgpu.Layout.WGMMA_8BIT, optimized=False)

        def multiply(acc, packed, slot, plane):
            x_slot = 2 * slot + plane // 2
            if plane % 2 == 0:
                plgpu.barrier_wait(x_filled.at[x_slot])
            codes, _ = unpack_rows(packed, plane, exact=True, wide=True)
            plgpu.wgmma(acc, codes, x_smem.at[x_slot, :, pl.ds(plane % 2 * PLANE, PLANE)].T)

        def release(slot):
            plgpu.commit_smem()  # the whole warpgroup has read
            plgpu.barrier_arrive(freed.at[slot])

        def release_x(slot, half):
            plgpu.barrier_arrive(x_freed.at[2 * slot + half])

        def step_grouped(slot, y):
            packed = load_codes(slot)
            alpha = [load_row(alpha_smem.at[slot, i, of_group]) for i in range(4)]

            def add_tile(y_ref, acc):
                y_ref[...] = y
                plgpu.wgmma(y_ref, scales_smem.at[slot, :, of_group].T, totals_smem.at[slot].T)
                # Not cleared between planes, acc is the sum over those so far: Σ α_i (acc_i − acc_{i−1}), rearranged.
                total = None
                for plane in range(4):
                    multiply(acc, packed, slot, plane)
                    product = acc[...].astype(jnp.float32)
                    if plane == 0:
                        total = y_ref[...]
                        release(slot)
                    if plane % 2:
                        release_x(slot, plane // 2)
                    factor = alpha[plane] - alpha[plane + 1] if plane < 3 else alpha[3]
                    total += spread(factor) * product
                return total

            shape = (_ROWS, _TOKENS)
            return pl.run_scoped(
                add_tile,
                plgpu.WGMMAAccumulatorRef(shape),
                plgpu.WGMMAAccumulatorRef(shape, jnp.int32),
            )

        def step_single(slot, acc):
            packed = load_codes(slot)

            def add_planes(acc):
                for plane in range(4):
                    multiply(acc, packed, slot, plane)
                    if plane == 2:
                        plgpu.wgmma_wait(1)
                        release_x(slot, 0)

            acc = pl.run_state(add_planes)(plgpu.WGMMAAccumulatorRef.init(acc))
            release_x(slot, 1)
            release(slot)
            return acc

        @pl.loop(0, mine)
        def _(i):
            first_token, first_row = place(i)
            tokens, rows = pl.ds(first_token, _TOKENS), pl.ds(first_row + group * _ROWS, _ROWS)

            def copy(source, target):
                plgpu.copy_gmem_to_smem(source, target, loaded.at[group])

            for j, source in enumerate((scale_gmem, zero_point_gmem)):
                copy(source.at[tokens], token_smem.at[group, j])
            for j, source in enumerate((row_sums_gmem, bias_gmem)):
                copy(source.at[rows], row_smem.at[group, j])
            if not weight.grouped:
                copy(totals_gmem.at[tokens], token_smem.at[group, 2])
                for j in range(2):
                    copy(scales_gmem.at[0, j, rows], row_scales_smem.at[group, j])

            def step(k, y):
                slot = lax.rem(i * steps + k, _STAGES)
                plgpu.barrier_wait(filled.at[slot])
                return step_grouped(slot, y) if weight.grouped else step_single(slot, y)

            dtype = jnp.float32 if weight.grouped else jnp.int32
            start = plgpu.layout_cast(jnp.zeros((_ROWS, _TOKENS), dtype), _LAYOUT)
            y = lax.fori_loop(0, steps, step, start)
            plgpu.barrier_wait(loaded.at[group])
            if not weight.grouped:
                alpha, mu = (spread(load_row(row_scales_smem.at[group, j])) for j in range(2))
                # U = T + 1, and both are whole numbers that float32 holds.
                y = alpha * (y.astype(jnp.float32) - load_token(2)) + mu * load_token(2)
            row_sums, bias = (spread(load_row(row_smem.at[group, j])) for j in range(2))
            y = load_token(0) * (y - load_token(1) * row_sums) + bias
            part, itemsize = out_smem.shape[1], out_smem.dtype.itemsize
            for j in range(0, _TOKENS, part):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                value = y[:, j : j + part].astype(out_smem.dtype)
                if itemsize == 4:  # what has fewer bytes is transposed on the way
                    value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
                out_smem.at[group].T[...] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[group], out_gmem.at[pl.ds(first_token + j, part), rows])

        plgpu.wait_smem_to_gmem(0)


def _swizzled(width: int, itemsize: int):
    tiling = plgpu.TilingTransform((8, width // itemsize))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(width))  # pyright: ignore[reportAbstractUsage]
