"""Two-bit weights times many int8 tokens on Hopper GPUs (Pallas Mosaic GPU), bound by the tensor cores.

A block computes 128 weight rows, 64 to each of two warpgroups, which unpack them in registers as the left operand of
`wgmma`; a third warpgroup keeps rings of tiles filled, across the outputs that a block computes one after the other.
While one warpgroup scales what it has summed, the other multiplies. Blocks of a cluster share tokens, which are read
once for all.

Where a row has several (α, μ), its weights are unpacked to whole numbers of its step, which int8 holds: sums of all
columns stay integers, and registers have room for more tokens than they would beside sums in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8, Int32

from twla_jax.ops.ternary_matmul import tiles as tuning
from twla_jax.ops.ternary_matmul.gpu_unpack import unpack_rows, unpack_weights
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import pad_columns
from twla_jax.packing import PLANE

_WARPGROUPS = 2  # that multiply; one more copies
_ROWS = 64  # of a warpgroup: those of `wgmma`
_BLOCK_ROWS = _WARPGROUPS * _ROWS
_STAGES = 2  # tiles of 512 columns of weights under way
_X_BYTES = 128 * 1024  # of tokens under way, 128 columns at a time
_LAYOUT = plgpu.Layout.WGMMA


def matmul(
    x: Int8[Array, "t m"],
    sums: Int32[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
    block_tokens: int | None = None,
    cluster: int = 2,
) -> Float[Array, "t rows"]:
    """What `reference.matmul` computes, for int8 x.

    Args:
      block_tokens: of a block, at most 256.
      cluster: blocks that share tokens.
    """
    t, grouped = len(x), weight.grouped
    block = block_tokens or (128 if t <= 128 else 256)
    # The copy engine swizzles 8 tokens by 128 bytes: it fills up what lies past the end, but cuts no such piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    x = jnp.pad(x, ((0, -t % 8), (0, 0)))
    # Sums of int8 weights need nothing beside them.
    last = weight.steps if grouped else jnp.pad(sums.sum(-1).astype(jnp.float32), (0, -t % 8))
    outputs = pl.cdiv(weight.rows, _BLOCK_ROWS * cluster) * pl.cdiv(t, block)
    x_slots, itemsize = _X_BYTES // (block * PLANE), jnp.dtype(out_dtype).itemsize
    scratch = {
        "codes_smem": plgpu.SMEM((_STAGES, _BLOCK_ROWS, PLANE), jnp.uint8, transforms=_swizzled(128, 1)),
        "x_smem": plgpu.SMEM((x_slots, block, PLANE), jnp.int8, transforms=_swizzled(128, 1)),
        "scales_smem": plgpu.SMEM((_STAGES, weight.planes, _BLOCK_ROWS), jnp.int16),
        "token_smem": plgpu.SMEM((_WARPGROUPS, 3, block), jnp.float32),
        "row_smem": plgpu.SMEM((_WARPGROUPS, 3, _ROWS), jnp.float32),
        "row_scales_smem": plgpu.SMEM((_WARPGROUPS, 2, _ROWS), jnp.float16),
        "out_smem": plgpu.SMEM(
            (_WARPGROUPS, math.gcd(block, 256 // itemsize), _ROWS),
            out_dtype,
            transforms=_swizzled(128, itemsize),
        ),
        "filled": plgpu.Barrier(num_arrivals=2 if grouped else 1, num_barriers=_STAGES),
        "freed": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        "x_filled": plgpu.Barrier(num_barriers=x_slots),
        "x_freed": plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=_WARPGROUPS, num_barriers=x_slots
        ),
        "loaded": plgpu.Barrier(num_arrivals=5 if grouped else 7, num_barriers=_WARPGROUPS),
    }
    y = plgpu.kernel(
        functools.partial(_kernel, outputs=outputs, cluster=cluster, weight=weight),
        out_type=jax.ShapeDtypeStruct((len(x), weight.rows), out_dtype),
        grid=(min(outputs, tuning.STREAMING_MULTIPROCESSORS // cluster),),
        grid_names=("block",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(weight.codes, weight.gpu_scales, weight.row_sums, weight.bias, x, scale, zero_point, last)
    return y[:t]


def _kernel(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    x_gmem,
    scale_gmem,
    zero_point_gmem,
    last_gmem,  # steps of rows where they have several groups, else sums of tokens
    out_gmem,
    *,
    codes_smem,
    x_smem,
    scales_smem,
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
    steps, planes = weight.tiles, weight.planes
    x_slots, block_tokens, _ = x_smem.shape
    group = lax.axis_index("warpgroup")
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    mine = lax.div(outputs - block + blocks - 1, blocks)

    def place(i):
        """First token and first row of this block's output i."""
        tokens = pl.cdiv(out_gmem.shape[0], block_tokens)
        output = block + i * blocks
        rows = lax.div(output, tokens) * cluster + lax.axis_index("cluster")
        return lax.rem(output, tokens) * block_tokens, rows * _BLOCK_ROWS

    @pl.when(group == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, mine * steps)
        def _(step):
            first_token, first_row = place(lax.div(step, steps))
            tile, slot = lax.rem(step, steps), lax.rem(step, _STAGES)
            tokens, rows = pl.ds(first_token, block_tokens), pl.ds(first_row, _BLOCK_ROWS)
            pl.when(step >= _STAGES)(lambda: plgpu.barrier_wait(freed.at[slot]))

            def copy(source, target):
                plgpu.copy_gmem_to_smem(source, target, filled.at[slot])

            copy(codes_gmem.at[tile, rows], codes_smem.at[slot])
            if weight.grouped:
                copy(scales_gmem.at[tile, :, rows], scales_smem.at[slot])
            for plane in range(planes):
                x_step = planes * step + plane
                x_slot = lax.rem(x_step, x_slots)
                pl.when(x_step >= x_slots)(lambda x_slot=x_slot: plgpu.barrier_wait(x_freed.at[x_slot]))
                source = x_gmem.at[tokens, pl.ds((planes * tile + plane) * PLANE, PLANE)]
                plgpu.copy_gmem_to_smem(
                    source, x_smem.at[x_slot], x_filled.at[x_slot], collective_axes="cluster"
                )

        # Other blocks of the cluster must be done with this one's memory before it ends.
        for barrier, slots, last in (
            (freed, _STAGES, mine * steps),
            (x_freed, x_slots, planes * mine * steps),
        ):

            @pl.loop(jnp.maximum(0, last - slots), last)
            def _(step, barrier=barrier, slots=slots):
                plgpu.barrier_wait(barrier.at[lax.rem(step, jnp.int32(slots))])

    @pl.when(group < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        of_group = pl.ds(group * _ROWS, _ROWS)

        def load_row(ref):
            return plgpu.load(ref, layout=_LAYOUT.reduce(1), optimized=False).astype(jnp.float32)

        def unpack(packed, slot, plane):
            if not weight.grouped:
                return unpack_rows(packed, plane, exact=True, wide=True)[0]
            pairs = plgpu.load(
                scales_smem.at[slot, plane, of_group], layout=_LAYOUT.reduce(1), optimized=False
            )
            return unpack_weights(packed, plane, pairs.astype(jnp.int32))

        def add_tile(tile, acc_ref):
            slot = lax.rem(tile, _STAGES)
            plgpu.barrier_wait(filled.at[slot])
            packed = plgpu.load(
                codes_smem.at[slot, of_group], layout=plgpu.Layout.WGMMA_8BIT, optimized=False
            )
            x_slot = None
            for plane in range(planes):
                codes, previous = unpack(packed, slot, plane), x_slot
                x_slot = lax.rem(planes * tile + plane, x_slots)
                plgpu.barrier_wait(x_filled.at[x_slot])
                plgpu.wgmma(acc_ref, codes, x_smem.at[x_slot].T)
                if previous is not None:
                    plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(x_freed.at[previous])

        def step(tile, acc):
            slot, x_slot = lax.rem(tile, _STAGES), lax.rem(planes * tile + planes - 1, x_slots)
            acc = pl.run_state(functools.partial(add_tile, tile))(plgpu.WGMMAAccumulatorRef.init(acc))
            plgpu.barrier_arrive(x_freed.at[x_slot])
            plgpu.commit_smem()  # the whole warpgroup has read
            plgpu.barrier_arrive(freed.at[slot])
            return acc

        def write(acc, tokens, out_slice):
            """Scales sums of some tokens, and sends them to their place."""
            shape = acc.shape

            def spread(values, axis):
                return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (axis,)), _LAYOUT)

            def load_token(j):
                ref = token_smem.at[group, j, tokens]
                return spread(plgpu.load(ref, layout=_LAYOUT.reduce(0), optimized=False), 1)

            def row(ref, j):
                return load_row(ref.at[group, j])

            y = acc.astype(jnp.float32)
            if weight.grouped:
                y *= spread(row(row_smem, 2), 0)
            else:
                alpha, mu = (spread(row(row_scales_smem, j), 0) for j in range(2))
                # U = T + 1, and both are whole numbers that float32 holds.
                y = alpha * (y - load_token(2)) + mu * load_token(2)
            row_sums, bias = (spread(row(row_smem, j), 0) for j in range(2))
            y = load_token(0) * (y - load_token(1) * row_sums) + bias
            value = y.astype(out_smem.dtype)
            if out_smem.dtype.itemsize == 4:  # what has fewer bytes is transposed on the way
                value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem.at[group].T[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[group], out_slice)

        @pl.loop(0, mine)
        def _(i):
            first_token, first_row = place(i)
            tokens, rows = pl.ds(first_token, block_tokens), pl.ds(first_row + group * _ROWS, _ROWS)

            def copy(source, target):
                plgpu.copy_gmem_to_smem(source, target, loaded.at[group])

            for j, source in enumerate((scale_gmem, zero_point_gmem)):
                copy(source.at[tokens], token_smem.at[group, j])
            for j, source in enumerate((row_sums_gmem, bias_gmem)):
                copy(source.at[rows], row_smem.at[group, j])
            if weight.grouped:
                copy(last_gmem.at[rows], row_smem.at[group, 2])
            else:
                copy(last_gmem.at[tokens], token_smem.at[group, 2])
                for j in range(2):
                    copy(scales_gmem.at[0, j, rows], row_scales_smem.at[group, j])

            start = plgpu.layout_cast(jnp.zeros((_ROWS, block_tokens), jnp.int32), _LAYOUT)
            acc = lax.fori_loop(i * steps, (i + 1) * steps, step, start)
            plgpu.barrier_wait(loaded.at[group])
            part = out_smem.shape[1]
            for j in range(0, block_tokens, part):
                write(acc[:, j : j + part], pl.ds(j, part), out_gmem.at[pl.ds(first_token + j, part), rows])

        plgpu.wait_smem_to_gmem(0)


def _swizzled(width: int, itemsize: int):
    tiling = plgpu.TilingTransform((8, width // itemsize))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(width))  # pyright: ignore[reportAbstractUsage]
