"""Norm, rotation and quantiser on Hopper GPUs (Pallas Mosaic GPU): a block goes from token to token.

The rotation is two products on the tensor cores, `Yᵀ = Rᵀ Xᵀ` and `Z = L Y`; written so, every operand lies in shared
memory as it comes, and the factors stay there for all tokens of a block. A token's matrix is copied as it lies in
memory, too: what L is filled up with, the copy engine adds as rows of zeros.
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

_LARGEST = 96 * 128  # features whose float32 matrix fits the registers of 128 threads
_BLOCKS = 2 * 132  # at most; two share a multiprocessor of an H100


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
    x: Float[Array, "t width"],
    rotation: KernelRotation,
    settings: Float32[Array, " 3"],
    norm_scale: Float[Array, " m"] | None,
    *,
    epsilon: float,
    gated: bool = False,
) -> QuantizedTokens:
    """What `reference.rotate_quantize` computes, for bf16 x."""
    t, size = len(x), rotation.size
    rows, r = len(rotation.left), len(rotation.right_transposed)
    chunks = r // layout.chunk(r)
    norm = () if norm_scale is None else (layout.as_matrices(norm_scale[None], rotation)[0],)
    blocks = min(t, _BLOCKS)
    codes, scale, zero_point, sums = plgpu.kernel(
        functools.partial(
            _kernel, t=t, blocks=blocks, size=size, epsilon=epsilon if norm else None, gated=gated
        ),
        out_type=(
            jax.ShapeDtypeStruct((t, size, r), jnp.int8),
            jax.ShapeDtypeStruct((t,), jnp.float32),
            jax.ShapeDtypeStruct((t,), jnp.float32),
            jax.ShapeDtypeStruct((t, chunks, rows), jnp.int32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="rotate_quantize",
        scratch_types={
            "left_smem": plgpu.SMEM((rows, rows), x.dtype, transforms=swizzled(rows)),
            "right_smem": plgpu.SMEM((r, r), x.dtype, transforms=swizzled(r)),
            "x_smem": token_memory(rows, r, x.dtype),
            "gate_or_y_smem": gate_or_turned_memory(rows, r, x.dtype),
            "codes_smem": plgpu.SMEM((rows, r), jnp.int8),
            "factors_filled": plgpu.Barrier(num_arrivals=2),
            "filled": plgpu.Barrier(num_arrivals=2 if gated else 1),
        },
        compiler_params=compiler_params(gated),
    )(
        layout.parts(x, rotation),
        rotation.left,
        rotation.right_transposed,
        settings,
        *norm,
    )
    return layout.collect(codes, scale, zero_point, sums[:, :, :size].swapaxes(1, 2))


def _kernel(
    x_gmem,
    left_gmem,
    right_gmem,
    settings_gmem,
    *refs,
    left_smem,
    right_smem,
    x_smem,
    gate_or_y_smem,
    codes_smem,
    factors_filled,
    filled,
    t: int,
    blocks: int,
    size: int,
    epsilon: float | None,
    gated: bool,
):
    *norm, codes_gmem, scale_gmem, zero_point_gmem, sums_gmem = refs
    gate_smem, y_smem = gate_or_y_smem
    block = lax.axis_index("block")

    def fetch_gate(token):
        if gated:
            fetch(x_gmem.at[token, 0], gate_smem, filled)

    def fetch_x(token):
        fetch(x_gmem.at[token, int(gated)], x_smem, filled)

    fetch_gate(block)
    fetch_x(block)
    plgpu.copy_gmem_to_smem(right_gmem, right_smem, factors_filled)
    plgpu.copy_gmem_to_smem(left_gmem, left_smem, factors_filled)
    norm = load_norm(norm, x_smem.shape, epsilon)
    plgpu.barrier_wait(factors_filled)

    @pl.loop(0, lax.div(t - block + blocks - 1, blocks))
    def _(step):
        token = block + step * blocks
        after = token + blocks
        plgpu.barrier_wait(filled)
        if gated:
            apply_gate(gate_smem, x_smem)
        turn_right(x_smem, right_smem, y_smem, norm, size=size)
        pl.when(after < t)(lambda: fetch_x(after))
        z = turn_left(y_smem, left_smem)
        if gated:
            plgpu.commit_smem()  # Yᵀ has been read by all before the next gate overwrites it
        pl.when(after < t)(lambda: fetch_gate(after))
        codes, scale, zero_point = quantize(z, settings_gmem, size=size)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the token before
        width = layout.chunk(x_smem.shape[1])
        for i in range(x_smem.shape[1] // width):
            # Not by way of shared memory, of which two blocks of 96×128 have all but some hundred bytes.
            sums_gmem[token, i] = jnp.sum(codes[:, i * width : (i + 1) * width], axis=1)
        codes_smem[...] = codes.astype(jnp.int8)
        scale_gmem[token] = scale
        zero_point_gmem[token] = zero_point
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(codes_smem.at[:size], codes_gmem.at[token])

    plgpu.wait_smem_to_gmem(0)


def compiler_params(gated: bool):
    """With a gate, whose exponential is rounded to bf16 anyway, the fast exponential."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=gated)


def token_memory(rows: int, r: int, dtype):
    """Shared memory for a token's matrix: one tile high, which the copy engine fills up past the last row."""
    return plgpu.SMEM((rows, r), dtype, transforms=swizzled(r, rows))


def gate_or_turned_memory(rows: int, r: int, dtype):
    """Shared memory for a gate and, once that is used up, for `Yᵀ`."""
    return plgpu.RefUnion(
        token_memory(rows, r, dtype), plgpu.SMEM((r, rows), dtype, transforms=swizzled(rows))
    )


def fetch(matrix_gmem, smem, filled) -> None:
    """Starts the copy of a token's matrix; rows past its last become zeros."""
    plgpu.copy_gmem_to_smem(matrix_gmem.at[pl.ds(jnp.int32(0), smem.shape[0])], smem, filled)


def apply_gate(gate_smem, x_smem) -> None:
    """`silu(gate) · x` in the place of x; gate_smem is free after that."""
    kind = _layouts(*x_smem.shape)[2]
    x_smem[...] = silu_product(*(plgpu.load(ref, layout=kind) for ref in (gate_smem, x_smem)))


def silu_product(gate: jax.Array, x: jax.Array) -> jax.Array:
    """`silu(gate) · x`, rounded to bf16 after every step, as XLA does it."""
    divisor = 1 + jnp.exp(-gate.astype(jnp.float32)).astype(gate.dtype)
    # A division takes many instructions, this takes two, and of such divisors it is the same once it is rounded.
    sigmoid = lax.square(lax.rsqrt(divisor.astype(jnp.float32))).astype(gate.dtype)
    return gate * sigmoid * x


def load_norm(norm, shape: tuple[int, int], epsilon: float | None):
    """Weights of a norm, in the layout that `turn_right` wants, and its ε; None without one."""
    if epsilon is None:
        return None
    return plgpu.load(norm[0], layout=_layouts(*shape)[2], optimized=False), epsilon


def turn_right(x_smem, right_smem, y_smem, norm, *, size: int) -> None:
    """`Yᵀ = Rᵀ Xᵀ` into `y_smem`, after the norm; x_smem is free after that."""
    rows, r = x_smem.shape
    if norm is not None:
        weights, epsilon = norm
        x = plgpu.load(x_smem, layout=_layouts(rows, r)[2]).astype(jnp.float32)
        mean = jnp.sum(jnp.sum(x * x, axis=1), axis=0) / (size * r)
        x_smem[...] = (x * lax.rsqrt(mean + epsilon) * weights.astype(jnp.float32)).astype(x_smem.dtype)
    y_smem[...] = _product(right_smem, x_smem)
    plgpu.commit_smem()


def turn_left(y_smem, left_smem) -> jax.Array:
    """`Z = L Y`, float32."""
    return _product(left_smem, y_smem).astype(jnp.float32)


def quantize(z, settings_gmem, *, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scale and zero point of a token that is the first `size` rows of z; codes of other rows are zero."""
    levels, clip, half = settings_gmem[0], settings_gmem[1], settings_gmem[2]
    real = plgpu.broadcasted_iota(jnp.int32, z.shape, 0, layout=_layouts(*z.shape)[2]) < size
    low = clip * jnp.min(jnp.min(jnp.where(real, z, jnp.inf), axis=1), axis=0)
    high = clip * jnp.max(jnp.max(jnp.where(real, z, -jnp.inf), axis=1), axis=0)
    scale = jnp.maximum((high - low) / levels, 1e-8)
    zero_point = jnp.round(-low / scale)
    codes = jnp.clip(jnp.round(z / scale) + zero_point, 0.0, levels) - half
    return jnp.where(real, codes, 0.0).astype(jnp.int32), scale, zero_point - half


def _product(a_smem, b_smem) -> jax.Array:
    """`a bᵀ`, rounded as the reference rounds what goes from one factor to the next, and to the quantiser."""
    m, n = a_smem.shape[0], b_smem.shape[0]
    left, right, total = _layouts(m, n)
    a, b = plgpu.load(a_smem, layout=left), plgpu.load(b_smem.T, layout=right)
    zero = plgpu.layout_cast(jnp.zeros((m, n), jnp.float32), total)
    return plgpu.mma(zero, a, b).astype(a_smem.dtype)


def _warps(m: int, n: int) -> int | None:
    """How many of the four warps lie below each other in an `m × n` product: as many as it allows, or None."""
    return next((w for w in (4, 2, 1) if m % (16 * w) == 0 and n % (32 // w) == 0), None)


def _layouts(m: int, n: int):
    """Left, right and sum of an `m × n` product."""
    warps = _warps(m, n)
    kinds = (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
    return tuple(kind(jnp.bfloat16, m_warps=warps) for kind in kinds)


def swizzled(columns: int, rows: int = 8):
    """Transforms of 16-bit matrices with so many columns, a multiple of 16, for shared memory without conflicts.

    `rows` are those of a tile, a multiple of 8.
    """
    swizzle = next(size for size in (128, 64, 32) if 2 * columns % size == 0)
    tiling = plgpu.TilingTransform((rows, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
