"""The ternary matmul on Hopper GPUs (Pallas Mosaic GPU): many tokens, bound by the tensor cores.

A block computes 128 weight rows, 64 to each of two warpgroups, which unpack them in registers as the left operand of
`wgmma`; a third warpgroup keeps a ring of tiles filled. While one scales the sums of a group, the other multiplies.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.ops.ternary_matmul.gpu_unpack import operand_layout, swizzled, unpack
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.packing import PLANE

_WARPGROUPS = 2  # that multiply; one more copies
_ROWS = 64  # of a warpgroup: what `wgmma` has
_STAGES = 2


def matmul(
    x: Float[Array, "t m"],
    sums: Float[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
    interpret=None,
) -> Float[Array, "t rows"]:
    """What `reference.matmul` computes, for int8 x or bf16 x in `unpacked_order`, of a multiple of 128 columns."""
    planes = weight.planes
    block = 128 // x.dtype.itemsize
    padding = -len(x) % block
    x = jnp.pad(x, ((0, padding), (0, 0)))
    totals = jnp.pad(sums.astype(jnp.float32), ((0, padding), (0, 0))).T
    scale, zero_point = (jnp.pad(v, (0, padding)) for v in (scale, zero_point))
    n = _WARPGROUPS * _ROWS
    return plgpu.kernel(
        functools.partial(_kernel, weight=weight, dtype=x.dtype),
        out_type=jax.ShapeDtypeStruct((len(x), len(weight.codes)), out_dtype),
        grid=(len(weight.codes) // n, len(x) // block),
        grid_names=("rows", "tokens"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types={
            "codes_smem": plgpu.SMEM((_STAGES, n, PLANE), jnp.uint8, transforms=swizzled(1)),
            "scales_smem": plgpu.SMEM((_STAGES, 2 * planes, n), jnp.float16),
            "x_smem": plgpu.SMEM(
                (_STAGES, block, planes * PLANE), x.dtype, transforms=swizzled(x.dtype.itemsize)
            ),
            "totals_smem": plgpu.SMEM((_STAGES, planes, block), jnp.float32),
            "out_smem": plgpu.SMEM((_WARPGROUPS, block, _ROWS), out_dtype),
            "filled": plgpu.Barrier(num_arrivals=4 if weight.grouped else 3, num_barriers=_STAGES),
            "freed": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        },
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )(weight.codes, weight.scales, weight.row_sums, weight.bias, x, totals, scale, zero_point)


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
    out_smem,
    filled,
    freed,
    weight: KernelWeight,
    dtype,
):
    planes, steps = weight.planes, weight.tiles
    _, block, _ = out_smem.shape
    group = lax.axis_index("warpgroup")
    first = lax.axis_index("rows") * _WARPGROUPS * _ROWS
    tokens = pl.ds(lax.axis_index("tokens") * block, block)

    @pl.when(group == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, steps)
        def _(k):
            slot = lax.rem(k, jnp.int32(_STAGES))
            pl.when(k >= _STAGES)(lambda: plgpu.barrier_wait(freed.at[slot]))
            rows = pl.ds(first, _WARPGROUPS * _ROWS)
            copies = [
                (codes_gmem.at[rows, pl.ds(k * PLANE, PLANE)], codes_smem),
                (x_gmem.at[tokens, pl.ds(k * planes * PLANE, planes * PLANE)], x_smem),
                (totals_gmem.at[pl.ds(k * planes, planes), tokens], totals_smem),
            ]
            if weight.grouped:
                copies.append((scales_gmem.at[k, :, rows], scales_smem))
            for source, ring in copies:
                plgpu.copy_gmem_to_smem(source, ring.at[slot], filled.at[slot])

    @pl.when(group < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(group * _ROWS, _ROWS)
        rows = pl.ds(first + group * _ROWS, _ROWS)
        layout = plgpu.Layout.WGMMA

        def spread(value, axis):
            return plgpu.layout_cast(lax.broadcast_in_dim(value, (_ROWS, block), (axis,)), layout)

        def load_token(ref):
            return spread(plgpu.load(ref, layout=layout.reduce(0), optimized=False), 1)

        def load_row(ref):
            return plgpu.load(ref, layout=layout.reduce(1), optimized=False).astype(jnp.float32)

        def step(k, y):
            slot = lax.rem(k, jnp.int32(_STAGES))
            plgpu.barrier_wait(filled.at[slot])
            packed = plgpu.load(
                codes_smem.at[slot, mine], layout=operand_layout(jnp.int8, wide=True), optimized=False
            )
            for plane in range(planes):
                codes = unpack(packed, plane, planes, dtype, wide=True)
                product = _product(codes, x_smem.at[slot, :, pl.ds(plane * PLANE, PLANE)].T)
                scales = (scales_smem.at[slot, i, mine] for i in (plane, planes + plane))
                if not weight.grouped:
                    scales = (scales_gmem.at[0, i, rows] for i in range(2))
                alpha, mu = map(load_row, scales)
                y += spread(alpha, 0) * product.astype(jnp.float32)
                y += spread(mu - weight.offset * alpha, 0) * load_token(totals_smem.at[slot, plane])
            pl.when(k + _STAGES < steps)(lambda: plgpu.barrier_arrive(freed.at[slot]))
            return y

        start = plgpu.layout_cast(jnp.zeros((_ROWS, block), jnp.float32), layout)
        y = lax.fori_loop(0, steps, step, start)
        y -= load_token(zero_point_gmem.at[tokens]) * spread(load_row(row_sums_gmem.at[rows]), 0)
        y = load_token(scale_gmem.at[tokens]) * y + spread(load_row(bias_gmem.at[rows]), 0)
        out_smem.at[group].T[...] = y.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[group], out_gmem.at[tokens, rows])
        plgpu.wait_smem_to_gmem(0)


def _product(codes: jax.Array, x_ref) -> jax.Array:
    def multiply(acc):
        plgpu.wgmma(acc, codes, x_ref)
        return acc[...]

    exact = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((codes.shape[0], x_ref.shape[1]), exact))
