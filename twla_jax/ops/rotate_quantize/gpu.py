"""Norms, rotates and quantises on Hopper GPUs (Pallas Mosaic GPU): a block goes from token to token.

A block has a warpgroup for every 64 columns of a token's matrix, and keeps both factors of the rotation in shared
memory. While it rotates one token, the next one is in flight.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.core.packing import PLANE, TILE
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.limits import MULTIPROCESSOR_MEMORY, STREAMING_MULTIPROCESSORS, WARPGROUPS
from twla_jax.ops.rotate_quantize import gpu_codes, gpu_fetch, gpu_rotation
from twla_jax.ops.rotate_quantize.gpu_codes import Plain
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.tokens import QuantizedTokens, quantizer_settings


def obstacle(x: jax.Array, rotation: KernelRotation | None, *, gated: bool = False) -> str | None:
    """Return why the kernel cannot take such tokens, or None."""
    if rotation is None:
        return "there is no rotation"
    if x.dtype != jnp.bfloat16:
        return f"activations are {x.dtype}, not bfloat16"
    shape = _shape(x, rotation, gated=gated)
    used = 2 * (shape.rows * shape.columns + shape.rows**2 + shape.columns**2)
    if used > MULTIPROCESSOR_MEMORY:
        return f"{shape.size}×{shape.r} and its rotation take {used} bytes, more than {MULTIPROCESSOR_MEMORY}"
    return gpu_rotation.obstacle(shape)


def rotate_quantize(
    x: Float[Array, "t width"],
    rotation: KernelRotation,
    settings: Float32[Array, " 3"] | None,
    norm_scale: Float[Array, " m"] | None,
    *,
    epsilon: float,
    gated: bool = False,
) -> QuantizedTokens:
    """Return what `reference.rotate_quantize` computes, for bf16 x."""
    wide = settings is None
    t, shape = len(x), _shape(x, rotation, gated=gated, wide=wide)
    settings = quantizer_settings(8, 1.0) if settings is None else settings
    count = 2 * t if wide else t
    norm = () if norm_scale is None else (threads.readable(norm_scale),)
    m, lie = shape.size * shape.r, Plain(shape.r)
    # WARPGROUPS on a multiprocessor: with more, a thread has too few registers for one token in flight beside the one
    # being rotated. 2048 tokens of 64×64 (a warpgroup each) took 17.2, 21.5 and 17.8 µs with two, three and four; those
    # of 86×128 with a gate (two each) 58.2, 59.7 and 62.1 with two, four and six.
    of_multiprocessor = WARPGROUPS // shape.warpgroups
    blocks = min(t, STREAMING_MULTIPROCESSORS * of_multiprocessor) if of_multiprocessor else t
    codes, scale, zero_point, sums = plgpu.kernel(
        functools.partial(
            _kernel, shape=shape, lie=lie, t=t, blocks=blocks, epsilon=epsilon if norm else None
        ),
        out_type=(
            jax.ShapeDtypeStruct((count, m), jnp.int8),
            jax.ShapeDtypeStruct((count,), jnp.float32),
            jax.ShapeDtypeStruct((count,), jnp.float32),
            jax.ShapeDtypeStruct((count, TILE // PLANE * pl.cdiv(m, TILE)), jnp.int32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=shape.warpgroups,
        thread_name="warpgroup",
        kernel_name="rotate_quantize",
        scratch_types={
            # A token is no longer needed when its codes are written.
            "token_or_codes_smem": plgpu.RefUnion(
                gpu_rotation.token_scratch(shape, x.dtype),
                plgpu.SMEM((shape.codes, shape.rows * lie.stride), jnp.int8),
            ),
            "left_smem": gpu_rotation.left_scratch(shape, x.dtype),
            "right_smem": gpu_rotation.right_scratch(shape, x.dtype),
            "warps_smem": gpu_rotation.warps_scratch(shape),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, rotation.left, rotation.right_transposed, settings, *norm)
    if wide:
        codes, scale, zero_point, sums = (
            each.reshape(2, t, *each.shape[1:]) for each in (codes, scale, zero_point, sums)
        )
    return QuantizedTokens(codes=codes, scale=scale, zero_point=zero_point, sums=sums, wide=wide)


def _shape(
    x: jax.Array, rotation: KernelRotation, *, gated: bool, wide: bool = False
) -> gpu_rotation.TokenShape:
    """Return the shape of one token, on as many warpgroups as it has lines."""
    one = jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype)
    lines = gpu_rotation.token_shape(one, rotation, 1).lines
    return gpu_rotation.token_shape(one, rotation, lines, gated=gated, wide=wide)


def _kernel(
    x_gmem,
    left_gmem,
    right_gmem,
    settings_gmem,
    *refs,
    token_or_codes_smem,
    left_smem,
    right_smem,
    warps_smem,
    shape: gpu_rotation.TokenShape,
    lie: Plain,
    t: int,
    blocks: int,
    epsilon: float | None,
):
    *norm, codes_gmem, scale_gmem, zero_point_gmem, sums_gmem = refs
    token_smem, codes_smem = token_or_codes_smem
    norm_gmem = norm[0] if norm else None
    first = lax.axis_index("block")

    def fetch(token, more=None):
        return gpu_fetch.prefetch_tokens(
            (x_gmem.at[token],), norm_gmem, settings_gmem, shape=shape, more=more
        )

    def finish(token, words, settings):
        words = gpu_fetch.prepare_tokens(words, settings_gmem[0], warps_smem, shape=shape, epsilon=epsilon)
        gpu_fetch.store_tokens(words, token_smem, shape=shape)
        gpu_fetch.synchronize(shape=shape)
        z = gpu_rotation.rotate(token_smem, right_smem, left_smem, shape=shape)
        found = gpu_codes.quantize(z, settings, codes_smem, None, warps_smem, shape=shape, lie=lie)
        for finer in range(shape.codes):
            row = token + finer * t
            outputs = codes_gmem.at[row], sums_gmem.at[row], scale_gmem, zero_point_gmem
            _write(found, row, codes_smem, *outputs, shape=shape, lie=lie, finer=finer)

    asked = fetch(first)
    factors = gpu_fetch.prefetch_factors(left_gmem, right_gmem, shape=shape)
    gpu_fetch.store_factors(factors, left_smem, right_smem, shape=shape)
    if blocks == t:
        return finish(first, *asked)

    def step(i, asked):
        token = first + i * blocks
        following = fetch(jnp.minimum(token + blocks, t - 1), jnp.where(token + blocks < t, 1, 0))
        finish(token, *asked)
        gpu_fetch.synchronize(
            shape=shape
        )  # all threads have read the codes before the next token overwrites them
        return following

    lax.fori_loop(0, lax.div(t - first + blocks - 1, blocks), step, asked)


def _write(
    found,
    row,
    codes_smem,
    codes_gmem,
    sums_gmem,
    scale_gmem,
    zero_point_gmem,
    *,
    shape: gpu_rotation.TokenShape,
    lie: Plain,
    finer: int,
) -> None:
    """Write a token's codes, their sums by groups of 128, and its scale and zero point `found` to global memory."""
    refs = codes_smem, codes_gmem, sums_gmem, scale_gmem, zero_point_gmem

    @threads.on_threads(
        arg_types=(
            threads.per_thread(2 * shape.codes),
            plgpu.Layout.WG_SPLAT,
            *[plgpu.RefType()] * len(refs),
        )
    )
    def write(_, found, row, codes, codes_out, sums_out, *out):
        me, start = threads.thread(), lie.token(codes, finer)
        lane, count, groups = me & (threads.WARP - 1), shape.size * shape.r, threads.shape(sums_out)[0]
        for first in range(0, groups, shape.warps):
            group = me // threads.WARP + first
            index = group * PLANE + lane * 4
            real = index < count
            four = threads.load(start + lie.place(index.least(count - 4)))[0]
            four = threads.select(real, four, threads.word(0))
            with threads.when(real):
                threads.store_global_words(codes_out, index, [four])
            total = threads.warp_sum(threads.sum_of_bytes(four))
            with threads.when(threads.both(lane.equals(0), group < groups)):
                threads.store_global_words(sums_out, group * 4, [total])
        with threads.when(me.equals(0)):
            for value, ref in zip(threads.reals(found)[2 * finer :][:2], out, strict=True):
                threads.store_real(ref, threads.splat_word(row), value)

    write(found, row, *refs)
