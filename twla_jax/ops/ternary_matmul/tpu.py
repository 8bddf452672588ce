"""Multiplies by packed weights on TPUs (Pallas Mosaic TPU), for any number of tokens."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from twla_jax.core.packing import PLANE
from twla_jax.ops.ternary_matmul import tile_configs
from twla_jax.ops.ternary_matmul.weight import KernelWeight, PackedWeight, fields_of_pair


def matmul(
    x: Float[Array, "t m"],
    sums: Float[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    residual: Float[Array, "t n"] | None = None,
    *,
    out_dtype,
    config: tile_configs.TpuTileConfig | None = None,
    interpret=False,
) -> Float[Array, "t n"]:
    """Return what `reference.matmul` computes, for int8 or bf16 x."""
    by_token, by_row = (scale, zero_point), (weight.row_sums, weight.bias, weight.steps)
    y = product(x, sums, weight, by_token, by_row, out_dtype=out_dtype, config=config, interpret=interpret)
    return weight.finished(y, residual)


def product(
    x: Float[Array, "t m"],
    sums: Float[Array, "t groups"],
    weight: PackedWeight,
    by_token: tuple[jax.Array, ...] = (),
    by_row: tuple[jax.Array, ...] = (),
    *,
    out_dtype,
    config: tile_configs.TpuTileConfig | None = None,
    interpret=False,
) -> Float[Array, "t rows"]:
    """Return what `reference.product` computes; given scales, zero points, row sums, biases and steps, `matmul`."""
    config = config or tile_configs.tpu_tile_config(len(x), weight.rows)
    t, planes = len(x), weight.planes
    groups, padding = weight.column_tiles * planes, -t % config.tokens
    x = jnp.pad(x, ((0, padding), (0, groups * PLANE - x.shape[1])))
    # A token's sums of a tile are neighbours, tiles come first: blocks may not cut the last axis to so few.
    totals = jnp.pad(sums[:, :groups], ((0, padding), (0, 0)))
    totals = totals.reshape(len(x), weight.column_tiles, planes).swapaxes(0, 1)
    grid = (len(x) // config.tokens, weight.rows // config.rows, weight.column_tiles)
    column = pl.BlockSpec((config.tokens, 1), lambda i, j, k: (i, 0))
    row = pl.BlockSpec((1, config.rows), lambda i, j, k: (0, j))
    exact = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    y = pl.pallas_call(
        functools.partial(accumulate, weight=weight, operand=operand(x.dtype)),
        grid=grid,
        in_specs=[
            pl.BlockSpec((config.tokens, planes * PLANE), lambda i, j, k: (i, k)),
            pl.BlockSpec((1, config.tokens, planes), lambda i, j, k: (k, i, 0)),
            pl.BlockSpec((1, config.rows, PLANE), lambda i, j, k: (k, j, 0)),
            pl.BlockSpec(
                (1, weight.parameters, config.rows),
                lambda i, j, k: (k if weight.grouped else 0, 0, j),
            ),
            *[column for _ in by_token],
            *[row for _ in by_row],
        ],
        out_specs=pl.BlockSpec((config.tokens, config.rows), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((len(x), weight.rows), out_dtype),
        scratch_shapes=[
            pltpu.VMEM((config.tokens, config.rows), jnp.float32 if weight.grouped else exact),
            pltpu.VMEM((config.tokens, 1), exact),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(
        x,
        totals,
        weight.codes,
        weight.scale_bits,
        *(jnp.pad(v, (0, padding))[:, None] for v in by_token),
        *(v[None] for v in by_row),
    )
    return y[:t]


def accumulate(x_ref, totals_ref, codes_ref, scales_ref, *refs, weight: PackedWeight, operand) -> None:
    """Add a tile's products to those of the block, and write them after the last: the kernel's body."""
    *affine_refs, out_ref, acc_ref, sum_ref = refs
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    # Byte vectors have no shifts on TPUs; four rows lie in the bytes of one word.
    words = pltpu.bitcast(codes_ref[0], jnp.int32)
    exact = jnp.int32 if operand == jnp.int8 else jnp.float32
    planes = weight.planes
    for plane in range(planes):
        codes, offset = _unpack(words, plane, weight)
        x = x_ref[:, plane * PLANE : (plane + 1) * PLANE].astype(operand)
        acc = lax.dot_general(
            x, codes.astype(operand), (((1,), (1,)), ((), ())), preferred_element_type=exact
        )
        total = totals_ref[0, :, plane : plane + 1]
        acc = acc.astype(total.dtype) - offset * total
        if weight.grouped:
            alpha, mu = _scales(scales_ref, plane, weight)
            acc, total = acc.astype(jnp.float32), total.astype(jnp.float32)
            acc_ref[...] += alpha * (acc + mu * total) if weight.relative else alpha * acc + mu * total
        else:
            acc_ref[...] += acc
            sum_ref[...] += total

    @pl.when(k == weight.column_tiles - 1)
    def _():
        y = acc_ref[...].astype(jnp.float32)
        if not weight.grouped:
            alpha, mu = _float16_bits(scales_ref[0, 0:1]), _float16_bits(scales_ref[0, 1:2])
            y = alpha * y + mu * sum_ref[...].astype(jnp.float32)
        if affine_refs:
            scale, zero_point, row_sums, bias, steps = (ref[...] for ref in affine_refs)
            y = scale * (steps * y - zero_point * row_sums) + bias
        out_ref[...] = y.astype(out_ref.dtype)


def _unpack(words: jax.Array, plane: int, weight: PackedWeight) -> tuple[jax.Array, int]:
    """Return a plane's codes as int8, and the offset that they are too large by."""
    if weight.bits == 8:  # int8 cannot hold the code, so its bytes hold 128 less
        return pltpu.bitcast(words ^ jnp.int32(-0x7F7F7F80), jnp.int8), 0
    mask = 0x01010101 * (2**weight.bits - 1)
    unsigned = lax.shift_right_logical(words, jnp.int32(weight.bits * plane)) & mask
    return pltpu.bitcast(unsigned, jnp.int8), weight.offset


def _scales(scales_ref, plane: int, weight: PackedWeight) -> tuple[jax.Array, jax.Array]:
    """Return α and μ of a plane."""
    first = scales_ref[0, plane : plane + 1]
    if weight.paired:
        alpha, mu = fields_of_pair(first.astype(jnp.int32))
        return alpha.astype(jnp.float32), mu.astype(jnp.float32)
    other = weight.planes + plane
    return _float16_bits(first), _float16_bits(scales_ref[0, other : other + 1])


def operand(dtype):
    """Return what the matrix unit multiplies: int8 where it can, else bf16, which holds codes and sums exactly."""
    if dtype == jnp.int8 and pltpu.is_tpu_device():
        return jnp.int8 if pltpu.get_tpu_info().is_matmul_supported(jnp.int8, jnp.int8) else jnp.bfloat16
    return dtype


def _float16_bits(bits: jax.Array) -> jax.Array:
    """Return float32 from the bits of float16, a type the vector unit does not have."""
    bits = bits.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    value = jnp.where(magnitude < 1024, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(bits < 0, -value, value)
