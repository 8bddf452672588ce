"""Multiplies blocks of rows by the packed matrices of their experts on TPUs (Pallas Mosaic TPU).

The experts of the blocks are known before the kernel runs, and say which codes are fetched: no other matrix is read.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from twla_jax.core.packing import PLANE
from twla_jax.ops.ternary_matmul import tile_configs, tpu, tpu_unpack
from twla_jax.ops.ternary_matmul.weight import KernelWeight, shapes_of_one

LEAST_ROWS, MOST_ROWS = 8, 64  # of a block


def products(
    x: Float[Array, "count size m"],
    weight: KernelWeight,
    experts: Int32[Array, " count"],
    *,
    interpret: bool = False,
) -> Float[Array, "count size rows"]:
    """Return what `api.products` does, for int8 or bf16 x."""
    count, size, _ = x.shape
    one = shapes_of_one(weight)
    columns = one.column_tiles * one.planes * PLANE
    config = tile_configs.tpu_tile_config(size, one.rows, columns, x.dtype.itemsize, many=False)
    block = tile_configs.tpu_expert_rows(one.rows, one.column_tiles)
    config = dataclasses.replace(config, rows=block)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, columns - x.shape[-1])))
    sums = jax.vmap(functools.partial(tpu.block_totals, weight=one, many=False))(_group_sums(x))
    body = tpu.kernel(one, tpu_unpack.operand(x.dtype), many=False)
    return pl.pallas_call(
        lambda experts_ref, *refs: body(*refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, one.rows // block),
            in_specs=[
                pl.BlockSpec((None, size, columns), lambda i, j, experts: (i, 0, 0)),
                pl.BlockSpec((None, *sums.shape[1:]), lambda i, j, experts: (i, 0, 0, 0)),
                pl.BlockSpec(
                    (None, one.column_tiles, block, PLANE), lambda i, j, experts: (experts[i], 0, j, 0)
                ),
                pl.BlockSpec(
                    (None, *one.scales.shape[:2], block), lambda i, j, experts: (experts[i], 0, 0, j)
                ),
            ],
            out_specs=pl.BlockSpec((None, size, block), lambda i, j, experts: (i, 0, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((count, size, one.rows), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=tile_configs.tpu_memory(config, columns, x.dtype.itemsize, one.bits, many=False),
        ),
        interpret=interpret,
    )(experts, x, sums, weight.codes, weight.scale_bits)


def _group_sums(x: Float[Array, "count size m"]) -> Float[Array, "count size groups"]:
    """Return the sums over groups of 128 columns, by a product: XLA's sums of bytes take as long as all the rest."""
    groups = jnp.repeat(jnp.eye(x.shape[-1] // PLANE, dtype=x.dtype), PLANE, axis=0)
    return jnp.matmul(x, groups, preferred_element_type=tpu_unpack.exact(x.dtype))
