"""Norm, rotation, codes and product of a single token in one kernel on Hopper GPUs (Pallas Mosaic GPU).

A single token's rotation takes one multiprocessor longer to wait for than to compute, and a kernel of its own as long
again to start. So every block computes it for itself, while its first tiles of weights come from memory, and goes on
from the codes as `ternary_matmul`'s kernel does.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.ops.quantized_linear import tiles as tuning
from twla_jax.ops.rotate_quantize import gpu as rotation_kernel
from twla_jax.ops.rotate_quantize import layout
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul.gpu_integer import ACC, RHS, ROWS, SWIZZLED, multiply, spread_row, store
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.packing import PLANE, TILE

_COLUMNS = 8  # that `mma.sync` has at least; all of them are the one token


def obstacle(x, rotation: KernelRotation | None, weight: KernelWeight) -> str | None:
    """Why the kernel cannot take such operands, or None."""
    if reason := rotation_kernel.obstacle(x.dtype, rotation):
        return reason
    assert rotation is not None
    if len(x) != 1:
        return f"there are {len(x)} tokens, not one"
    if len(rotation.left) * len(rotation.right_transposed) < weight.tiles * TILE:
        return (
            f"{rotation.size}×{len(rotation.right_transposed)} activations do not fill whole tiles of {TILE}"
        )
    return None


def quantized_linear(
    x: Float[Array, "1 m"],
    rotation: KernelRotation,
    settings: Float32[Array, " 3"],
    weight: KernelWeight,
    norm_scale: Float[Array, " m"] | None,
    residual: Float[Array, "1 n"] | None,
    *,
    epsilon: float,
    out_dtype,
    tiles: tuning.Tiles | None = None,
) -> Float[Array, "1 n"]:
    """What `reference.quantized_linear` computes, for one token in bf16."""
    rows, r = len(rotation.left), len(rotation.right_transposed)
    tiles = tiles or tuning.tiles(len(weight.codes), weight.tiles)
    groups, stages = tiles.warpgroups, tiles.stages
    norm = () if norm_scale is None else (layout.as_matrices(norm_scale[None], rotation)[0],)
    added = (
        ()
        if residual is None
        else (jnp.pad(residual, ((0, 0), (0, len(weight.codes) - residual.shape[1])))[0],)
    )
    y = plgpu.kernel(
        functools.partial(
            _kernel,
            tiles=tiles,
            weight=weight,
            size=rotation.size,
            epsilon=epsilon if norm else None,
        ),
        out_type=jax.ShapeDtypeStruct((1, len(weight.codes)), out_dtype),
        grid=(len(weight.codes) // ROWS,),
        grid_names=("rows",),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types={
            "left_smem": plgpu.SMEM((rows, rows), x.dtype, transforms=rotation_kernel.swizzled(rows)),
            "right_smem": plgpu.SMEM((r, r), x.dtype, transforms=rotation_kernel.swizzled(r)),
            "token_smem": rotation_kernel.token_memory(rows, r, x.dtype),
            "turned_smem": plgpu.SMEM((r, rows), x.dtype, transforms=rotation_kernel.swizzled(rows)),
            "x_smem": plgpu.SMEM((rows, r), jnp.int8),
            "scalars_smem": plgpu.SMEM((2,), jnp.float32),
            "codes_smem": plgpu.SMEM((groups, stages, ROWS, PLANE), jnp.uint8, transforms=SWIZZLED),
            "scales_smem": plgpu.SMEM((groups, stages, 8, ROWS), jnp.float16),
            "parts_smem": plgpu.SMEM((groups, ROWS, _COLUMNS), jnp.float32),
            "token_filled": plgpu.Barrier(num_arrivals=3),
            "token_ready": plgpu.Barrier(),
            "filled": plgpu.Barrier(num_arrivals=2 if weight.grouped else 1, num_barriers=groups * stages),
            "added": plgpu.Barrier(num_arrivals=groups),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(
        weight.codes,
        weight.scales,
        weight.row_sums,
        weight.bias,
        layout.parts(x, rotation)[0, 0],
        rotation.left,
        rotation.right_transposed,
        settings,
        *norm,
        *added,
    )
    return y[:, : weight.out_features]


def _kernel(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    x_gmem,
    left_gmem,
    right_gmem,
    settings_gmem,
    *refs,
    left_smem,
    right_smem,
    token_smem,
    turned_smem,
    x_smem,
    scalars_smem,
    codes_smem,
    scales_smem,
    parts_smem,
    token_filled,
    token_ready,
    filled,
    added,
    tiles: tuning.Tiles,
    weight: KernelWeight,
    size: int,
    epsilon: float | None,
):
    *optional, out_gmem = refs
    norm, residual = optional[: epsilon is not None], optional[epsilon is not None :]
    group = lax.axis_index("warpgroup")
    first_row = lax.axis_index("rows") * ROWS
    rows = pl.ds(first_row, ROWS)
    steps = lax.div(weight.tiles - group + tiles.warpgroups - 1, tiles.warpgroups)

    @pl.when(group == 0)
    def _():
        rotation_kernel.fetch(x_gmem, token_smem, token_filled)
        for source, target in ((right_gmem, right_smem), (left_gmem, left_smem)):
            plgpu.copy_gmem_to_smem(source, target, token_filled)

    def fetch(step, slot):
        tile = step * tiles.warpgroups + group
        barrier = filled.at[group * tiles.stages + slot]
        plgpu.copy_gmem_to_smem(
            codes_gmem.at[rows, pl.ds(tile * PLANE, PLANE)], codes_smem.at[group, slot], barrier
        )
        if weight.grouped:
            plgpu.copy_gmem_to_smem(scales_gmem.at[tile, :, rows], scales_smem.at[group, slot], barrier)

    for slot in range(tiles.stages):
        pl.when(slot < steps)(functools.partial(fetch, jnp.int32(slot), slot))

    @pl.when(group == 0)
    def _():
        weights = rotation_kernel.load_norm(norm, token_smem.shape, epsilon)
        plgpu.barrier_wait(token_filled)
        rotation_kernel.turn_right(token_smem, right_smem, turned_smem, weights, size=size)
        z = rotation_kernel.turn_left(turned_smem, left_smem)
        codes, scale, zero_point = rotation_kernel.quantize(z, settings_gmem, size=size)
        x_smem[...] = codes.astype(jnp.int8)
        scalars_smem[0] = scale
        scalars_smem[1] = zero_point
        plgpu.commit_smem()
        plgpu.barrier_arrive(token_ready)

    plgpu.barrier_wait(token_ready)
    flat = x_smem.reshape(x_smem.shape[0] * x_smem.shape[1])

    def load_tokens(slot, k, plane):
        start = (k * tiles.warpgroups + group) * TILE + plane * PLANE
        column = plgpu.load(flat.at[pl.ds(start, PLANE)], layout=RHS.reduce(1), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(column, (PLANE, _COLUMNS), (0,)), RHS)

    parts_smem[group] = multiply(
        load_tokens,
        codes_smem.at[group],
        scales_smem.at[group],
        lambda i: scales_gmem.at[0, i, rows],
        lambda slot: filled.at[group * tiles.stages + slot],
        fetch,
        steps,
        stages=tiles.stages,
        tokens=_COLUMNS,
        grouped=weight.grouped,
    )
    plgpu.barrier_arrive(added)

    @pl.when(group == 0)
    def _():
        row_sums, bias = (spread_row(ref.at[rows], _COLUMNS) for ref in (row_sums_gmem, bias_gmem))
        more = [spread_row(ref.at[rows], _COLUMNS) for ref in residual]
        plgpu.barrier_wait(added)
        parts = [plgpu.load(parts_smem.at[i], layout=ACC, optimized=False) for i in range(tiles.warpgroups)]
        total = functools.reduce(jnp.add, parts) - scalars_smem[1] * row_sums
        y = (scalars_smem[0] * total + bias).astype(out_gmem.dtype)
        for each in more:  # rounded before, as two ops would
            y = (y.astype(jnp.float32) + each).astype(out_gmem.dtype)
        store(y, out_gmem, jnp.int32(0), first_row)
