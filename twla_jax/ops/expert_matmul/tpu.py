"""Multiplies blocks of rows by the packed matrices of their experts on TPUs (Pallas Mosaic TPU).

The experts of the blocks are known before the kernel runs, and say which codes are fetched: no other matrix is read.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from twla_jax.core.packing import PLANE
from twla_jax.ops.ternary_matmul import tile_configs, tpu
from twla_jax.ops.ternary_matmul.weight import KernelWeight, shapes_of_one
from twla_jax.ops.tokens import group_sums

LEAST_ROWS = 32  # of a block: a tile of int8


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
    block = tile_configs.tpu_tile_config(size, one.rows).rows
    groups = one.column_tiles * one.planes
    x = jnp.pad(x.reshape(count * size, -1), ((0, 0), (0, groups * PLANE - x.shape[-1])))
    totals = group_sums(x).reshape(len(x), one.column_tiles, one.planes).swapaxes(0, 1)
    exact = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32

    def kernel(experts_ref, *refs):
        tpu.accumulate(*refs, weight=one, operand=tpu.operand(x.dtype))

    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, one.rows // block, one.column_tiles),
            in_specs=[
                pl.BlockSpec((size, one.planes * PLANE), lambda i, j, k, experts: (i, k)),
                pl.BlockSpec((1, size, one.planes), lambda i, j, k, experts: (k, i, 0)),
                pl.BlockSpec((None, 1, block, PLANE), lambda i, j, k, experts: (experts[i], k, j, 0)),
                pl.BlockSpec(
                    (None, 1, one.parameters, block),
                    lambda i, j, k, experts: (experts[i], k if one.grouped else 0, 0, j),
                ),
            ],
            out_specs=pl.BlockSpec((size, block), lambda i, j, k, experts: (i, j)),
            scratch_shapes=[
                pltpu.VMEM((size, block), jnp.float32 if one.grouped else exact),
                pltpu.VMEM((size, 1), exact),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((len(x), one.rows), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(experts, x, totals, weight.codes, weight.scale_bits)
    return y.reshape(count, size, one.rows)
