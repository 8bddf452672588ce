"""Norm, rotation and quantiser on Hopper GPUs (Pallas Mosaic GPU): a block goes from token to token.

A block has a warpgroup for every 64 columns of a token's matrix, and keeps both factors of the rotation in shared
memory. While it turns a token, the next one is on its way.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.core.packing import PLANE, TILE
from twla_jax.ops.hopper import threads as threads
from twla_jax.ops.rotate_quantize import gpu_codes, gpu_fetch
from twla_jax.ops.rotate_quantize import gpu_token as turning
from twla_jax.ops.rotate_quantize.gpu_codes import Plain
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul.tile_configs import STREAMING_MULTIPROCESSORS
from twla_jax.ops.tokens import QuantizedTokens, quantizer_settings

_MEMORY = 226 * 1024  # bytes of shared memory
# Of the blocks that share a multiprocessor. 2048 tokens of 64×64 (a warpgroup each) took 17.2, 21.5 and 17.8 µs with
# two, three and four, of 86×128 with a gate (two each) 58.2, 59.7 and 62.1 with two, four and six.
_WARPGROUPS = 2


def obstacle(x: jax.Array, rotation: KernelRotation | None, *, gated: bool = False) -> str | None:
    """Why the kernel cannot take such tokens, or None."""
    if rotation is None:
        return "there is no rotation"
    if x.dtype != jnp.bfloat16:
        return f"activations are {x.dtype}, not bfloat16"
    shape = _shape(x, rotation, gated=gated)
    used = 2 * (shape.rows * shape.columns + shape.rows**2 + shape.columns**2)
    if used > _MEMORY:
        return f"a token of {shape.size}×{shape.r} and its rotation take {used} bytes, more than {_MEMORY}"
    return turning.obstacle(shape)


def rotate_quantize(
    x: Float[Array, "t width"],
    rotation: KernelRotation,
    settings: Float32[Array, " 3"] | None,
    norm_scale: Float[Array, " m"] | None,
    *,
    epsilon: float,
    gated: bool = False,
) -> QuantizedTokens:
    """What `reference.rotate_quantize` computes, for bf16 x."""
    wide = settings is None
    t, shape = len(x), _shape(x, rotation, gated=gated, wide=wide)
    settings = quantizer_settings(8, 1.0) if settings is None else settings
    count = 2 * t if wide else t
    norm = () if norm_scale is None else (threads.readable(norm_scale),)
    m, lie = shape.size * shape.r, Plain(shape.r)
    # More warpgroups leave a thread too few registers for a token on its way beside the one that is turned.
    of_multiprocessor = _WARPGROUPS // shape.warpgroups
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
            # A token is used up when its codes are written.
            "token_or_codes_smem": plgpu.RefUnion(
                turning.token_memory(shape, x.dtype),
                plgpu.SMEM((shape.codes, shape.rows * lie.stride), jnp.int8),
            ),
            "left_smem": turning.left_memory(shape, x.dtype),
            "right_smem": turning.right_memory(shape, x.dtype),
            "warps_smem": turning.warps_memory(shape),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, rotation.left, rotation.right_transposed, settings, *norm)
    if wide:
        codes, scale, zero_point, sums = (
            each.reshape(2, t, *each.shape[1:]) for each in (codes, scale, zero_point, sums)
        )
    return QuantizedTokens(codes=codes, scale=scale, zero_point=zero_point, sums=sums, wide=wide)


def _shape(x: jax.Array, rotation: KernelRotation, *, gated: bool, wide: bool = False) -> turning.Shape:
    """Of one token, on as many warpgroups as it has lines."""
    one = jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype)
    lines = turning.shape(one, rotation, 1).lines
    return turning.shape(one, rotation, lines, gated=gated, wide=wide)


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
    shape: turning.Shape,
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
        return gpu_fetch.fetch((x_gmem.at[token],), norm_gmem, settings_gmem, shape=shape, more=more)

    def finish(token, words, settings):
        words = gpu_fetch.ready(words, settings_gmem[0], warps_smem, shape=shape, epsilon=epsilon)
        gpu_fetch.load(words, token_smem, shape=shape)
        gpu_fetch.meet(shape=shape)
        z = turning.turn(token_smem, right_smem, left_smem, shape=shape)
        found = gpu_codes.quantize(z, settings, codes_smem, None, warps_smem, shape=shape, lie=lie)
        for part in range(shape.codes):
            row = token + part * t
            outputs = codes_gmem.at[row], sums_gmem.at[row], scale_gmem, zero_point_gmem
            _write(found, row, codes_smem, *outputs, shape=shape, lie=lie, part=part)

    asked = fetch(first)
    factors = gpu_fetch.fetch_factors(left_gmem, right_gmem, shape=shape)
    gpu_fetch.load_factors(factors, left_smem, right_smem, shape=shape)
    if blocks == t:
        return finish(first, *asked)

    def step(i, asked):
        token = first + i * blocks
        following = fetch(jnp.minimum(token + blocks, t - 1), jnp.where(token + blocks < t, 1, 0))
        finish(token, *asked)
        gpu_fetch.meet(shape=shape)  # codes have been read by all before the next token takes their place
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
    shape: turning.Shape,
    lie: Plain,
    part: int,
) -> None:
    """A token's codes, their sums by groups of 128, and `found`, its scale and zero point, to global memory."""
    refs = codes_smem, codes_gmem, sums_gmem, scale_gmem, zero_point_gmem

    @threads.on_threads(
        arg_types=(
            threads.per_thread(2 * shape.codes),
            plgpu.Layout.WG_SPLAT,
            *[plgpu.RefType()] * len(refs),
        )
    )
    def write(_, found, row, codes, codes_out, sums_out, *out):
        me, start = threads.thread(), lie.token(codes, part)
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
            for value, ref in zip(threads.reals(found)[2 * part :][:2], out, strict=True):
                threads.store_real(ref, threads.splat_word(row), value)

    write(found, row, *refs)
