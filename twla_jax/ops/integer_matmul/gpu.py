"""Chooses the GPU kernel of integer weights by their bits and the number of tokens (Pallas Mosaic GPU)."""

import jax
from jaxtyping import Array, Float

from twla_jax.ops.integer_matmul.weight import IntegerWeight
from twla_jax.ops.ternary_matmul import gpu, gpu_many_floats


def product(
    x: Float[Array, "t m"], sums: Float[Array, "t groups"], weight: IntegerWeight, *, out_dtype
) -> jax.Array:
    """Return what `reference.product` computes `[t, rows]`, for bf16 x, in `out_dtype`."""
    if gpu_many_floats.obstacle(len(x), weight) is None:
        return gpu_many_floats.product(x, weight, out_dtype=out_dtype)
    return gpu.product(x, sums, weight, out_dtype=out_dtype)
