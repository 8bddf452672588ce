"""Two-bit weights times many int8 tokens on Hopper GPUs (Pallas Mosaic GPU), bound by the tensor cores.

Two warpgroups multiply, 64 weight rows each, which they unpack in registers as the left operand of `wgmma`. Each has
rows of its own; or both have the same, where that keeps more multiprocessors busy, and every other tile of columns. A
third warpgroup keeps rings of tiles filled, a warp for each line of columns, across the outputs that a block computes
one after the other. While one warpgroup scales what it has summed, the other multiplies. Blocks of a cluster share
tokens, which are read once for all.

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
_LAYOUT = plgpu.Layout.WGMMA


def matmul(
    x: Int8[Array, "t m"],
    sums: Int32[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    residual: Float[Array, "t n"] | None = None,
    *,
    out_dtype,
    tiles: tuning.ManyTiles | None = None,
) -> Float[Array, "t n"]:
    """What `reference.matmul` computes, for int8 x, and the residual added."""
    t, grouped, itemsize = len(x), weight.grouped, jnp.dtype(out_dtype).itemsize
    tiles = tiles or tuning.many_tiles(t, weight.rows)
    block, lines, cluster = tiles.tokens, tiles.lines, tiles.cluster
    parts = _WARPGROUPS // lines
    rows = _ROWS * parts
    # The copy engine swizzles 8 tokens by 128 bytes: it fills up what lies past the end, but cuts no such piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    x = jnp.pad(x, ((0, -t % 8), (0, 0)))
    added = []
    if (
        residual is not None
        and residual.dtype == out_dtype
        and itemsize == 2
        and weight.rows == residual.shape[1]
    ):
        added = [jnp.pad(residual, ((0, -t % 8), (0, 0)))]
    # Sums of int8 weights need nothing beside them.
    last = weight.steps if grouped else jnp.pad(sums.sum(-1).astype(jnp.float32), (0, -t % 8))
    outputs = pl.cdiv(weight.rows, rows * cluster) * pl.cdiv(t, block)
    stages, x_slots = tiles.stages, tiles.x_slots
    scratch = {
        "codes_smem": plgpu.SMEM((lines, stages, rows, PLANE), jnp.uint8, transforms=_swizzled(128, 1)),
        "x_smem": plgpu.SMEM(
            (lines, x_slots, block, tiles.x_planes * PLANE), jnp.int8, transforms=_swizzled(128, 1)
        ),
        "scales_smem": plgpu.SMEM((lines, stages, weight.planes, rows), jnp.int16),
        "token_smem": plgpu.SMEM((parts, 3, block), jnp.float32),
        "row_smem": plgpu.SMEM((parts, 3, _ROWS), jnp.float32),
        "row_scales_smem": plgpu.SMEM((parts, 2, _ROWS), jnp.float16),
        "sums_smem": plgpu.SMEM((_ROWS, block), jnp.int32) if lines > 1 else None,
        "out_smem": plgpu.SMEM(
            (parts, math.gcd(block, 256 // itemsize), _ROWS),
            out_dtype,
            transforms=_swizzled(128, itemsize),
        ),
        "filled": plgpu.Barrier(num_arrivals=2 if grouped else 1, num_barriers=lines * stages),
        "freed": plgpu.Barrier(num_arrivals=parts, num_barriers=lines * stages),
        "x_filled": plgpu.Barrier(num_barriers=lines * x_slots),
        "x_freed": plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=parts, num_barriers=lines * x_slots
        ),
        "loaded": plgpu.Barrier(num_arrivals=5 if grouped else 7, num_barriers=parts),
        "residual_filled": plgpu.Barrier(num_barriers=parts),
        "added": plgpu.Barrier(),
        "taken": plgpu.Barrier(),
    }
    scratch = {name: kind for name, kind in scratch.items() if kind is not None}
    y = plgpu.kernel(
        functools.partial(_kernel, outputs=outputs, tiles=tiles, weight=weight),
        out_type=jax.ShapeDtypeStruct((len(x), weight.rows), out_dtype),
        grid=(min(outputs, tuning.STREAMING_MULTIPROCESSORS // cluster),),
        grid_names=("block",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="ternary_matmul_many",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(weight.codes, weight.gpu_scales, weight.row_sums, weight.bias, x, scale, zero_point, last, *added)
    return weight.finished(y[:t], None if added else residual)


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
    residual_filled,
    added,
    taken,
    sums_smem=None,
    outputs: int,
    tiles: tuning.ManyTiles,
    weight: KernelWeight,
):
    *residual_gmem, out_gmem = residual_and_out_gmem
    steps, planes = weight.tiles, weight.planes
    lines, stages, x_slots, cluster = tiles.lines, tiles.stages, tiles.x_slots, tiles.cluster
    block_tokens, rows_each = tiles.tokens, _ROWS * _WARPGROUPS // lines
    width, shares = tiles.x_planes * PLANE, planes // tiles.x_planes
    group = lax.axis_index("warpgroup")
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    mine = lax.div(outputs - block + blocks - 1, blocks)

    def place(i):
        """First token and first row of this block's output i."""
        tokens = pl.cdiv(out_gmem.shape[0], block_tokens)
        output = block + i * blocks
        rows = lax.div(output, tokens) * cluster + lax.axis_index("cluster")
        return lax.rem(output, tokens) * block_tokens, rows * rows_each

    def of_line(line):
        """How many of an output's tiles."""
        return lax.div(steps - line + lines - 1, lines)

    def copy_line(line):
        """All that the warpgroups of a line read, tile after tile."""
        own = of_line(line)

        @pl.loop(0, mine * own)
        def _(k):
            i, turn = lax.div(k, own), lax.rem(k, own)
            first_token, first_row = place(i)
            tile, slot = turn * lines + line, lax.rem(k, stages)
            tokens, rows = pl.ds(first_token, block_tokens), pl.ds(first_row, rows_each)
            barrier = line * stages + slot
            pl.when(k >= stages)(lambda: plgpu.barrier_wait(freed.at[barrier]))

            def copy(source, target):
                plgpu.copy_gmem_to_smem(source, target.at[line, slot], filled.at[barrier])

            copy(codes_gmem.at[tile, rows], codes_smem)
            if weight.grouped:
                copy(scales_gmem.at[tile, :, rows], scales_smem)
            for share in range(shares):
                x_step = shares * k + share
                x_slot = lax.rem(x_step, x_slots)
                barrier = line * x_slots + x_slot
                pl.when(x_step >= x_slots)(lambda barrier=barrier: plgpu.barrier_wait(x_freed.at[barrier]))
                source = x_gmem.at[tokens, pl.ds((shares * tile + share) * width, width)]
                plgpu.copy_gmem_to_smem(
                    source, x_smem.at[line, x_slot], x_filled.at[barrier], collective_axes="cluster"
                )

        # Other blocks of the cluster must be done with this one's memory before it ends.
        for barrier, slots, last in (
            (freed, stages, mine * own),
            (x_freed, x_slots, shares * mine * own),
        ):

            @pl.loop(jnp.maximum(0, last - slots), last)
            def _(step, barrier=barrier, slots=slots):
                plgpu.barrier_wait(barrier.at[line * slots + lax.rem(step, jnp.int32(slots))])

    @pl.when(group == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @plgpu.warp_map
        def _(line):
            pl.when(line < lines)(lambda: copy_line(line))

    @pl.when(group < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        line, part = lax.rem(group, lines), lax.div(group, lines)
        own = of_line(line)
        of_group = pl.ds(part * _ROWS, _ROWS)

        def load_row(ref):
            return plgpu.load(ref, layout=_LAYOUT.reduce(1), optimized=False).astype(jnp.float32)

        def unpack(packed, pairs, plane):
            if not weight.grouped:
                return unpack_rows(packed, plane, exact=True, wide=True)[0]
            return unpack_weights(packed, plane, pairs[plane].astype(jnp.int32))

        def load_pairs(slot, plane):
            return plgpu.load(
                scales_smem.at[line, slot, plane, of_group], layout=_LAYOUT.reduce(1), optimized=False
            )

        def add_tile(k, acc_ref):
            slot = lax.rem(k, stages)
            plgpu.barrier_wait(filled.at[line * stages + slot])
            packed = plgpu.load(
                codes_smem.at[line, slot, of_group], layout=plgpu.Layout.WGMMA_8BIT, optimized=False
            )
            pairs = [load_pairs(slot, plane) for plane in range(planes) if weight.grouped]
            x_slot = None
            for plane in range(planes):
                share, place = divmod(plane, tiles.x_planes)
                codes, previous = unpack(packed, pairs, plane), x_slot
                if place == 0:
                    x_slot = lax.rem(shares * k + share, x_slots)
                    plgpu.barrier_wait(x_filled.at[line * x_slots + x_slot])
                plgpu.wgmma(acc_ref, codes, x_smem.at[line, x_slot, :, pl.ds(place * PLANE, PLANE)].T)
                if plane:
                    plgpu.wgmma_wait(1)
                if plane and place == 0:
                    plgpu.barrier_arrive(x_freed.at[line * x_slots + previous])

        def step(k, acc):
            slot, x_slot = lax.rem(k, stages), lax.rem(shares * k + shares - 1, x_slots)
            acc = pl.run_state(functools.partial(add_tile, k))(plgpu.WGMMAAccumulatorRef.init(acc))
            plgpu.barrier_arrive(x_freed.at[line * x_slots + x_slot])
            plgpu.barrier_arrive(freed.at[line * stages + slot])
            return acc

        def fetch_residual(tokens, rows):
            """What is to be added, into the place of the outputs, once those before have left it."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for ref in residual_gmem:
                plgpu.copy_gmem_to_smem(ref.at[tokens, rows], out_smem.at[part], residual_filled.at[part])

        def write(acc, tokens, out_slice):
            """Scales sums of some tokens, and sends them to their place."""
            shape = acc.shape

            def spread(values, axis):
                return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (axis,)), _LAYOUT)

            def load_token(j):
                ref = token_smem.at[part, j, tokens]
                return spread(plgpu.load(ref, layout=_LAYOUT.reduce(0), optimized=False), 1)

            def row(ref, j):
                return load_row(ref.at[part, j])

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
            if residual_gmem:
                plgpu.barrier_wait(residual_filled.at[part])
                value += plgpu.load(out_smem.at[part].T, layout=_LAYOUT, optimized=False)
                plgpu.commit_smem()  # all have read before it is overwritten
            if out_smem.dtype.itemsize == 4:  # what has fewer bytes is transposed on the way
                value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem.at[part].T[...] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[part], out_slice)

        def fetch_ends(first_token, first_row):
            tokens, rows = pl.ds(first_token, block_tokens), pl.ds(first_row, _ROWS)

            def copy(source, target):
                plgpu.copy_gmem_to_smem(source, target, loaded.at[part])

            for j, source in enumerate((scale_gmem, zero_point_gmem)):
                copy(source.at[tokens], token_smem.at[part, j])
            for j, source in enumerate((row_sums_gmem, bias_gmem)):
                copy(source.at[rows], row_smem.at[part, j])
            if weight.grouped:
                copy(last_gmem.at[rows], row_smem.at[part, 2])
            else:
                copy(last_gmem.at[tokens], token_smem.at[part, 2])
                for j in range(2):
                    copy(scales_gmem.at[0, j, rows], row_scales_smem.at[part, j])

        def finish(acc, first_token, first_row):
            rows, width = pl.ds(first_row, _ROWS), out_smem.shape[1]
            plgpu.barrier_wait(loaded.at[part])
            for j in range(0, block_tokens, width):
                tokens = pl.ds(first_token + j, width)
                if j and residual_gmem:
                    fetch_residual(tokens, rows)
                write(acc[:, j : j + width], pl.ds(j, width), out_gmem.at[tokens, rows])

        @pl.loop(0, mine)
        def _(i):
            first_token, first_row = place(i)
            first_row += part * _ROWS

            def fetch():
                fetch_ends(first_token, first_row)
                if residual_gmem:
                    fetch_residual(pl.ds(first_token, out_smem.shape[1]), pl.ds(first_row, _ROWS))

            # Of two lines, the first one finishes what both have summed.
            fetch() if lines == 1 else pl.when(line == 0)(fetch)
            start = plgpu.layout_cast(jnp.zeros((_ROWS, block_tokens), jnp.int32), _LAYOUT)
            acc = lax.fori_loop(i * own, (i + 1) * own, step, start)
            if lines == 1:
                return finish(acc, first_token, first_row)

            @pl.when(line == 1)
            def _():
                pl.when(i > 0)(lambda: plgpu.barrier_wait(taken))
                sums_smem[...] = acc
                plgpu.barrier_arrive(added)

            @pl.when(line == 0)
            def _():
                plgpu.barrier_wait(added)
                total = acc + plgpu.load(sums_smem, layout=_LAYOUT, optimized=False)
                plgpu.barrier_arrive(taken)
                finish(total, first_token, first_row)

        plgpu.wait_smem_to_gmem(0)


def _swizzled(width: int, itemsize: int):
    tiling = plgpu.TilingTransform((8, width // itemsize))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(width))  # pyright: ignore[reportAbstractUsage]
