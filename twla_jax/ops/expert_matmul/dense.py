"""Products of blocks of rows with their experts' matrices, floats or packed: what XLA runs everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import packed_matmul

_SIDE_BY_SIDE = 16  # blocks up to which all are computed at once, each with a copy of its expert's matrix


def block_products(
    x: Float[Array, "count size m"],
    kernel: Float[Array, "experts m n"] | PackedTensor,
    experts: Int32[Array, " count"],
) -> Float[Array, "count size n"]:
    """Return `x_b W_e(b)` for every block b, in `x.dtype`; float kernels have a gradient.

    A matrix is unpacked where it is used, one at a time; for few blocks, all at once.

    Args:
      x: rows in blocks.
      kernel: of all experts; of packed ones, rows are outputs.
      experts: of each block.
    """
    if isinstance(kernel, PackedTensor):
        return over_blocks(lambda rows, one: packed_matmul(rows, one), x, kernel, experts)
    return _products(x, kernel.astype(x.dtype), experts)


def over_blocks(function: Any, x: Any, kernel: Any, experts: Int32[Array, " count"]) -> Any:
    """Return `function(x_b, kernel_e(b))` for every block, stacked."""

    def one(operands):
        rows, expert = operands
        return function(rows, jax.tree.map(lambda leaf: leaf[expert], kernel))

    if len(experts) <= _SIDE_BY_SIDE:
        return jax.vmap(one)((x, experts))
    return jax.lax.map(one, (x, experts))


@jax.custom_vjp
def _products(x, kernel, experts):
    return over_blocks(_matmul, x, kernel, experts)


def _forward(x, kernel, experts):
    return _products(x, kernel, experts), (x, kernel, experts)


def _backward(operands, slope):
    x, kernel, experts = operands

    # The gradient of all experts is carried and added to in place: a scan's own would be of all of them at each block.
    def add(total, block):
        rows, slope, expert = block
        return total.at[expert].add(_matmul(rows.T, slope).astype(total.dtype)), None

    total, _ = jax.lax.scan(add, jnp.zeros(kernel.shape, jnp.float32), (x, slope, experts))
    back = over_blocks(_matmul, slope, kernel.swapaxes(-1, -2), experts)
    return back, total.astype(kernel.dtype), np.zeros(experts.shape, jax.dtypes.float0)


_products.defvjp(_forward, _backward)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, y, precision=precision)
