"""Norms, rotates and quantises on TPUs (Pallas Mosaic TPU): a block of tokens, one after the other."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int8, Int32

from twla_jax.core.packing import PLANE
from twla_jax.ops.rotate_quantize.reference import gate
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.tokens import QuantizedTokens

_TOKENS = 8


def obstacle(dtype, rotation: KernelRotation | None, *, wide: bool = False) -> str | None:
    """Return why the kernel cannot take such activations, or None."""
    if rotation is None:
        return "there is no rotation"
    if wide:
        return "codes of 16 bits are made by XLA"
    return None if dtype == jnp.bfloat16 else f"activations are {dtype}, not bfloat16"


def rotate_quantize(
    x: Float[Array, "t width"],
    rotation: KernelRotation,
    settings: Float32[Array, " 3"],
    norm_scale: Float[Array, " m"] | None,
    *,
    epsilon: float,
    gated: bool = False,
    interpret=False,
) -> QuantizedTokens:
    """Return what `reference.rotate_quantize` computes, for bf16 x; XLA computes a gate."""
    x = gate(x) if gated else x
    t = len(x)
    x = jnp.pad(_as_matrices(x, rotation), ((0, -t % _TOKENS), (0, 0), (0, 0)))
    _, rows, r = x.shape
    chunks = r // _chunk(r)
    norm = () if norm_scale is None else (_as_matrices(norm_scale[None], rotation)[0],)

    def whole(shape):
        return pl.BlockSpec(shape, lambda i: (0,) * len(shape))

    def block(*shape):
        return pl.BlockSpec((_TOKENS, *shape), lambda i: (i,) + (0,) * len(shape))

    codes, scale, zero_point, sums = pl.pallas_call(
        functools.partial(_kernel, size=rotation.size, epsilon=epsilon if norm else None),
        grid=(len(x) // _TOKENS,),
        in_specs=[
            block(rows, r),
            whole((rows, rows)),
            whole((r, r)),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(whole(scale.shape) for scale in norm),
        ],
        out_specs=[block(rows, r), block(1), block(1), block(rows, chunks)],
        out_shape=[
            jax.ShapeDtypeStruct((len(x), rows, r), jnp.int8),
            jax.ShapeDtypeStruct((len(x), 1), jnp.float32),
            jax.ShapeDtypeStruct((len(x), 1), jnp.float32),
            jax.ShapeDtypeStruct((len(x), rows, chunks), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(x, rotation.left, rotation.right_transposed, settings, *norm)
    codes, sums = codes[:t, : rotation.size], sums[:t, : rotation.size]
    return _collect(codes, scale[:t, 0], zero_point[:t, 0], sums)


def _kernel(x_ref, left_ref, right_ref, settings_ref, *refs, size: int, epsilon: float | None):
    *norm, codes_ref, scale_ref, zero_point_ref, sums_ref = refs
    _, rows, r = x_ref.shape
    levels, clip, half = settings_ref[0], settings_ref[1], settings_ref[2]
    real = lax.broadcasted_iota(jnp.int32, (rows, r), 0) < size
    width = r // sums_ref.shape[2]

    def total(values, reduce):
        return reduce(reduce(values, axis=1, keepdims=True), axis=0, keepdims=True)

    def product(a, b, contracted):
        dimensions = (((1,), (contracted,)), ((), ()))
        # Round as the reference does between the factors, and before the quantiser.
        return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32).astype(x_ref.dtype)

    for token in range(x_ref.shape[0]):
        x = x_ref[token]
        if epsilon is not None:
            values = x.astype(jnp.float32)
            mean = total(values * values, jnp.sum) / (size * r)
            x = (values * lax.rsqrt(mean + epsilon) * norm[0][...].astype(jnp.float32)).astype(x.dtype)
        z = product(left_ref[...], product(x, right_ref[...], 1), 0).astype(jnp.float32)
        low = clip * total(jnp.where(real, z, jnp.inf), jnp.min)
        high = clip * total(jnp.where(real, z, -jnp.inf), jnp.max)
        scale = jnp.maximum((high - low) / levels, 1e-8)
        zero_point = jnp.round(-low / scale)
        codes = jnp.clip(jnp.round(z / scale) + zero_point, 0, levels) - half
        codes = codes.astype(jnp.int32)
        for i in range(sums_ref.shape[2]):
            columns = codes[:, i * width : (i + 1) * width]
            sums_ref[token, :, i : i + 1] = columns.sum(axis=1, keepdims=True)
        codes_ref[token] = codes.astype(jnp.int8)
        scale_ref[token : token + 1] = scale
        zero_point_ref[token : token + 1] = zero_point - half


def _as_matrices(x: Float[Array, "t m"], rotation: KernelRotation) -> Float[Array, "t rows r"]:
    """Return each token as `mat(x)`, with rows of zeros up to those of the padded L."""
    rows, r = len(rotation.left), len(rotation.right_transposed)
    return jnp.pad(x, ((0, 0), (0, rows * r - x.shape[1]))).reshape(len(x), rows, r)


def _chunk(r: int) -> int:
    """Return the columns of `mat(x)` that one sum of codes covers; groups of 128 begin and end between chunks."""
    return math.gcd(r, PLANE)


def _collect(
    codes: Int8[Array, "t l r"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    sums: Int32[Array, "t l chunks"],
) -> QuantizedTokens:
    """Return the kernel's outputs without padding, as flat tokens with a sum for every group of 128."""
    t, _, r = codes.shape
    # Groups are whole numbers of chunks; the last group may be short.
    flat = sums.reshape(t, -1)
    per_group = PLANE // _chunk(r)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % per_group)))
    groups = flat.reshape(t, -1, per_group).sum(-1)
    groups = jnp.pad(groups, ((0, 0), (0, -groups.shape[1] % 4)))
    return QuantizedTokens(codes=codes.reshape(t, -1), scale=scale, zero_point=zero_point, sums=groups)
