"""Norm, rotation and quantiser on Hopper GPUs (Pallas Mosaic GPU): a block a token.

The rotation is two products on the tensor cores, `Yᵀ = Rᵀ Xᵀ` and `Z = L Y`; written so, both right operands lie in
shared memory as they come, and both left ones in device memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.ops.rotate_quantize import layout
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.tokens import QuantizedTokens
from twla_jax.packing import PLANE, TILE

_TILE = 16  # values that a layout of vectors has at least
_LARGEST = 96 * 128  # features whose float32 matrix fits the registers of 128 threads


def obstacle(dtype, rotation: KernelRotation | None) -> str | None:
    """Why the kernel cannot take such activations, or None."""
    if rotation is None:
        return "there is no rotation"
    rows, r = len(rotation.left), len(rotation.right_transposed)
    if dtype != jnp.bfloat16:
        return f"activations are {dtype}, not bfloat16"
    if r % 16:
        return f"the right factor has {r} rows, not a multiple of 16"
    if rows * r > _LARGEST:
        return f"{rows}×{r} activations are more than {_LARGEST}"
    if not (_warps(r, rows) and _warps(rows, r)):
        return f"four warps cannot share products of {rows}×{r}"
    return None


def rotate_quantize(
    x: Float[Array, "t m"],
    rotation: KernelRotation,
    settings: Float32[Array, " 3"],
    norm_scale: Float[Array, " m"] | None,
    *,
    epsilon: float,
) -> QuantizedTokens:
    """What `reference.rotate_quantize` computes, for bf16 x."""
    t, size = len(x), rotation.size
    rows, r = len(rotation.left), len(rotation.right_transposed)
    chunks, per_group = r // layout.chunk(r), PLANE // layout.chunk(r)
    groups = 4 * -(-size * r // TILE)
    # A layout of vectors has whole tiles of them.
    whole = -(-max(rows * chunks, groups * per_group) // (_TILE * per_group)) * _TILE
    norm = () if norm_scale is None else (layout.as_matrices(norm_scale[None], rotation)[0],)
    codes, scale, zero_point, sums = plgpu.kernel(
        functools.partial(_kernel, size=size, epsilon=epsilon if norm else None),
        out_type=(
            jax.ShapeDtypeStruct((t, size, r), jnp.int8),
            jax.ShapeDtypeStruct((t,), jnp.float32),
            jax.ShapeDtypeStruct((t,), jnp.float32),
            jax.ShapeDtypeStruct((t, groups), jnp.int32),
        ),
        grid=(t,),
        grid_names=("token",),
        scratch_types={
            "x_smem": plgpu.SMEM((rows, r), x.dtype, transforms=_swizzled(r)),
            # The copy engine fills up the rows that are not there, but cuts no tile of 8.
            "raw_smem": plgpu.SMEM((rows, r) if size % 8 else (1, 1), x.dtype),
            "y_smem": plgpu.SMEM((r, rows), x.dtype, transforms=_swizzled(rows)),
            "codes_smem": plgpu.SMEM((rows, r), jnp.int8),
            "chunks_smem": plgpu.SMEM((whole * per_group,), jnp.int32),
            "sums_smem": plgpu.SMEM((whole,), jnp.int32),
            "filled": plgpu.Barrier(),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(
        x.reshape(t, size, r),
        rotation.left,
        rotation.right_transposed,
        settings,
        *norm,
    )
    return QuantizedTokens(codes=codes.reshape(t, -1), scale=scale, zero_point=zero_point, sums=sums)


def _kernel(
    x_gmem,
    left_gmem,
    right_gmem,
    settings_gmem,
    *refs,
    x_smem,
    raw_smem,
    y_smem,
    codes_smem,
    chunks_smem,
    sums_smem,
    filled,
    size: int,
    epsilon: float | None,
):
    *norm, codes_gmem, scale_gmem, zero_point_gmem, sums_gmem = refs
    rows, r = x_smem.shape
    token = lax.axis_index("token")
    landing = raw_smem if size % 8 else x_smem
    plgpu.copy_gmem_to_smem(x_gmem.at[token, pl.ds(0 * token, rows)], landing, filled)
    left_y, right_y, sum_y = _layouts(r, rows)
    left_z, right_z, sum_z = _layouts(rows, r)
    right = plgpu.load(right_gmem, layout=left_y, optimized=False)
    levels, clip, half = settings_gmem[0], settings_gmem[1], settings_gmem[2]
    plgpu.barrier_wait(filled)
    if epsilon is not None or size % 8:
        x = plgpu.load(landing, layout=sum_z, optimized=not size % 8)
        if epsilon is not None:
            x = x.astype(jnp.float32)
            mean = jnp.sum(jnp.sum(x * x, axis=1), axis=0) / (size * r)
            weights = plgpu.load(norm[0], layout=sum_z, optimized=False).astype(jnp.float32)
            x = x * lax.rsqrt(mean + epsilon) * weights
        x_smem[...] = x.astype(x_smem.dtype)

    def product(a, b, shape, sum_layout):
        zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), sum_layout)
        # Rounded as the reference rounds what goes from one factor to the next, and to the quantiser.
        return plgpu.mma(zero, a, b).astype(x_smem.dtype)

    y_smem[...] = product(right, plgpu.load(x_smem.T, layout=right_y), (r, rows), sum_y)
    left = plgpu.load(left_gmem, layout=left_z, optimized=False)
    z = product(left, plgpu.load(y_smem.T, layout=right_z), (rows, r), sum_z).astype(jnp.float32)
    real = plgpu.broadcasted_iota(jnp.int32, (rows, r), 0, layout=sum_z) < size
    low = clip * jnp.min(jnp.min(jnp.where(real, z, jnp.inf), axis=1), axis=0)
    high = clip * jnp.max(jnp.max(jnp.where(real, z, -jnp.inf), axis=1), axis=0)
    scale = jnp.maximum((high - low) / levels, 1e-8)
    zero_point = jnp.round(-low / scale)
    codes = jnp.where(real, jnp.clip(jnp.round(z / scale) + zero_point, 0.0, levels) - half, 0.0)
    codes = codes.astype(jnp.int32)
    codes_smem[...] = codes.astype(jnp.int8)
    _group_sums(codes, chunks_smem, sums_smem)
    scale_gmem[token] = scale
    zero_point_gmem[token] = zero_point - half
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes_smem.at[:size], codes_gmem.at[token])
    plgpu.copy_smem_to_gmem(sums_smem.at[: sums_gmem.shape[1]], sums_gmem.at[token])
    plgpu.wait_smem_to_gmem(0)


def _group_sums(codes, chunks_smem, sums_smem):
    """Sums over 128 columns of the flat codes, of the sums over the chunks that a row of the matrix is cut into."""
    rows, r = codes.shape
    width = layout.chunk(r)
    per_group = PLANE // width
    vector = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=1).reduce(1)
    if rows * r < PLANE * len(sums_smem):
        chunks_smem[...] = plgpu.layout_cast(jnp.zeros(chunks_smem.shape, jnp.int32), vector)
    by_row = chunks_smem.at[: rows * r // width].reshape(rows, r // width)
    for i in range(r // width):
        by_row[:, i] = jnp.sum(codes[:, i * width : (i + 1) * width], axis=1)
    by_group = chunks_smem.reshape(len(sums_smem), per_group)
    sums_smem[...] = sum(
        plgpu.load(by_group.at[:, i], layout=vector, optimized=False) for i in range(per_group)
    )


def _warps(m: int, n: int) -> int | None:
    """How many of the four warps lie below each other in an `m × n` product: as many as it allows, or None."""
    return next((w for w in (4, 2, 1) if m % (16 * w) == 0 and n % (32 // w) == 0), None)


def _layouts(m: int, n: int):
    """Left, right and sum of an `m × n` product."""
    warps = _warps(m, n)
    kinds = (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
    return tuple(kind(jnp.bfloat16, m_warps=warps) for kind in kinds)


def _swizzled(columns: int):
    swizzle = next(size for size in (128, 64, 32) if 2 * columns % size == 0)
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
