"""Multiplies blocks of rows by the packed matrices of their experts on Hopper GPUs (Pallas Mosaic GPU).

It is the kernel of `ternary_matmul` for bf16 tokens, each of whose blocks reads the matrix of its own expert. Codes of
int8 tokens are whole numbers that bf16 holds.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from twla_jax.ops.ternary_matmul import gpu, tile_configs
from twla_jax.ops.ternary_matmul.weight import KernelWeight, shapes_of_one
from twla_jax.ops.tokens import group_sums

LEAST_ROWS, MOST_ROWS = 16, 16  # of a block


def products(
    x: Float[Array, "count size m"], weight: KernelWeight, experts: Int32[Array, " count"]
) -> Float[Array, "count size rows"]:
    """Return what `api.products` does, for int8 or bf16 x."""
    count, size, m = x.shape
    one = shapes_of_one(weight)
    config = tile_configs.gpu_tile_config(size, one.rows * count, one.column_tiles, one.planes)
    x = x.astype(jnp.bfloat16).reshape(-1, m)
    y = gpu.product(x, group_sums(x), weight, out_dtype=jnp.float32, config=config, experts=experts)
    return y.reshape(count, size, one.rows)
