"""Multiplies blocks of rows by their experts' matrices, floats or packed, in XLA, which runs everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import packed_matmul
from twla_jax.ops.expert_matmul.blocks import block_size, expert_blocks

_SIDE_BY_SIDE = 16  # blocks up to which all are computed at once, each with a copy of its expert's matrix


def expert_products(
    x: Float[Array, "*tokens m"],
    kernel: Float[Array, "experts m n"] | PackedTensor,
    experts: Int32[Array, "*tokens k"],
) -> Float[Array, "*tokens k n"]:
    """Return the outputs of each token's k experts, in `x.dtype`.

    Args:
      x: one input a token, or, with an axis k, one for each of its experts.
      kernel: of all experts; of packed ones, rows are outputs.
      experts: of each token.
    """
    rows, choices, count = x.reshape(-1, x.shape[-1]), experts.size, kernel.shape[0]
    blocks = expert_blocks(experts.reshape(-1), count, block_size(choices, count))
    y = block_products(blocks.gather(rows, choices // len(rows)), kernel, blocks.experts)
    return blocks.scatter(y).reshape(*experts.shape, -1)


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


def add_outer_products(
    total: Float[Array, "experts m n"],
    left: Float[Array, "count size m"],
    right: Float[Array, "count size n"],
    experts: Int32[Array, " count"],
) -> Float[Array, "experts m n"]:
    """Return the total with `left_bᵀ right_b` of every block b added to its expert's.

    It is added to in place, a block at a time: as the gradient of a gather it would be one of all experts for each.
    """

    def add(total, block):
        rows, others, expert = block
        own = total[expert] + _matmul(rows.T, others).astype(total.dtype)
        return jax.lax.dynamic_update_index_in_dim(total, own, expert, 0), None

    return jax.lax.scan(add, total, (left, right, experts))[0]


@jax.custom_vjp
def _products(x, kernel, experts):
    return over_blocks(_matmul, x, kernel, experts)


def _forward(x, kernel, experts):
    return _products(x, kernel, experts), (x, kernel, experts)


def _backward(operands, slope):
    x, kernel, experts = operands
    total = add_outer_products(jnp.zeros(kernel.shape, jnp.float32), x, slope, experts)
    back = over_blocks(_matmul, slope, kernel.swapaxes(-1, -2), experts)
    return back, total.astype(kernel.dtype), np.zeros(experts.shape, jax.dtypes.float0)


_products.defvjp(_forward, _backward)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, y, precision=precision)
