"""Multiplies by packed weights on TPUs (Pallas Mosaic TPU), for any number of tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from twla_jax.core.packing import PLANE
from twla_jax.ops.ternary_matmul import tile_configs, tpu_few, tpu_many, tpu_offsets, tpu_unpack
from twla_jax.ops.ternary_matmul.weight import KernelWeight, PackedWeight


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
    columns = weight.column_tiles * weight.planes * PLANE
    many = not weight.relative and len(x) > tile_configs.TPU_FEW_TOKENS
    if config is None:
        config = tile_configs.tpu_tile_config(len(x), weight.rows, columns, x.dtype.itemsize, many=many)
    padding = -len(x) % config.tokens
    x = jnp.pad(x, ((0, padding), (0, columns - x.shape[1])))
    totals = block_totals(jnp.pad(sums, ((0, padding), (0, 0))), weight, many=many)
    operand = tpu_unpack.operand(x.dtype)
    once = (
        pl.Buffered(1) if many and len(x) == config.tokens else None
    )  # what is loaded once needs no second place
    y = pl.pallas_call(
        kernel(weight, operand, many=many),
        grid=(len(x) // config.tokens, weight.rows // config.rows),
        in_specs=[
            pl.BlockSpec((config.tokens, columns), lambda i, j: (i, 0), pipeline_mode=once),
            pl.BlockSpec((len(totals), config.tokens, totals.shape[2]), lambda i, j: (0, i, 0)),
            pl.BlockSpec((weight.column_tiles, config.rows, PLANE), lambda i, j: (0, j, 0)),
            pl.BlockSpec((*weight.scales.shape[:2], config.rows), lambda i, j: (0, 0, j)),
            *[pl.BlockSpec((config.tokens, 1), lambda i, j: (i, 0)) for _ in by_token],
            *[pl.BlockSpec((1, config.rows), lambda i, j: (0, j)) for _ in by_row],
        ],
        out_specs=pl.BlockSpec((config.tokens, config.rows), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((len(x), weight.rows), out_dtype),
        scratch_shapes=[pltpu.VMEM((config.rows, columns), operand)] if many else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=tile_configs.tpu_memory(
                config, columns, x.dtype.itemsize, weight.bits, many=many
            ),
        ),
        interpret=interpret,
    )(
        x,
        totals,
        weight.codes,
        weight.scale_bits,
        *(jnp.pad(v, (0, padding))[:, None] for v in by_token),
        *(v[None] for v in by_row),
    )
    return y[: len(y) - padding]


def kernel(weight: PackedWeight, operand, *, many: bool) -> Callable[..., None]:
    """Return the body of the kernel for many tokens, or for few."""
    settings: dict[str, Any] = {"weight": weight, "operand": operand}
    together = tpu_unpack.planes_together()
    if many:
        return functools.partial(tpu_many.kernel, chunk=together * tpu_many.CHUNK, **settings)
    return functools.partial(tpu_few.kernel, together=together, **settings)


def block_totals(
    sums: Float[Array, "t groups"], weight: PackedWeight, *, many: bool
) -> Float[Array, "tiles t planes"]:
    """Return what a kernel's body reads of the sums of groups: by tile, or in one piece for pairs or single groups."""
    if not weight.grouped:
        return sums.sum(-1)[None, :, None]
    if many:
        return jnp.zeros((1, len(sums), 1), sums.dtype)  # the weights hold μ
    groups = weight.column_tiles * weight.planes
    if weight.paired:
        return tpu_offsets.totals(sums[:, :groups])
    # A token's sums of a tile are neighbours, tiles come first: a loop over tiles may not cut the last axis.
    return sums[:, :groups].reshape(len(sums), weight.column_tiles, weight.planes).swapaxes(0, 1)
