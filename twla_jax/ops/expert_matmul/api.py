"""Multiplies tokens by the packed ternary matrices of their experts: the public entry of this op."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from twla_jax.ops.dispatch import Implementation, dispatch
from twla_jax.ops.expert_matmul import gpu, tpu
from twla_jax.ops.expert_matmul.blocks import block_size, expert_blocks
from twla_jax.ops.expert_matmul.dense import over_blocks
from twla_jax.ops.ternary_matmul import reference
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import QuantizedTokens, group_sums

Products = Callable[[jax.Array, KernelWeight, jax.Array], jax.Array]


def expert_matmul(
    x: Float[Array, "*rows m"] | QuantizedTokens,
    weight: KernelWeight,
    experts: Int32[Array, "*tokens k"],
    *,
    out_dtype=jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "*tokens k n"]:
    """Return `x Ŵ_eᵀ` of each token and each of its experts e, of quantised tokens or of floats.

    Of the packed matrices, only those are read that some token goes to. Tokens are sorted into blocks of one expert
    each; a few tokens are not, each of their experts has a block of its own.

    Args:
      x: tokens, or with an axis k, a row for each of a token's experts; of floats, kernels take bf16 alone.
      weight: from `kernel_weight`, with a leading axis of experts on every array; without biases.
      experts: of each token.
      out_dtype: of the result.
      implementation: `xla`, `gpu` or `tpu`; None takes the platform's kernel, or the reference where that cannot be
        used, which is logged.

    Returns:
      `[*tokens, k, weight.out_features]`.

    Raises:
      TwlaError: the requested implementation cannot be used.
    """
    quantized = isinstance(x, QuantizedTokens)
    values = x.codes if isinstance(x, QuantizedTokens) else x
    ends = (x.scale.reshape(-1), x.zero_point.reshape(-1)) if isinstance(x, QuantizedTokens) else ()
    obstacle = None if quantized or values.dtype == jnp.bfloat16 else f"activations are {values.dtype}"
    y = dispatch(
        "expert_matmul",
        implementation,
        _blocked(products, 1, out_dtype),
        {
            "gpu": _blocked(gpu.products, gpu.LEAST_ROWS, out_dtype, gpu.MOST_ROWS),
            "tpu": _blocked(tpu.products, tpu.LEAST_ROWS, out_dtype, tpu.MOST_ROWS),
        },
        dict.fromkeys(("gpu", "tpu"), obstacle),
        values.reshape(-1, values.shape[-1]),
        ends,
        weight,
        experts.reshape(-1),
    )
    return y.reshape(*experts.shape, weight.out_features)


def products(
    x: Float[Array, "count size m"] | Int8[Array, "count size m"],
    weight: KernelWeight,
    experts: Int32[Array, " count"],
) -> Float[Array, "count size rows"]:
    """Return the products of blocks of rows with their experts' matrices, in steps of a row, float32, in plain XLA."""

    def one(rows: jax.Array, of_expert: KernelWeight) -> jax.Array:
        return reference.product(rows, group_sums(rows), of_expert)

    return over_blocks(one, x, weight, experts)


def _blocked(op: Products, least: int, out_dtype: Any, most: int | None = None) -> Callable[..., jax.Array]:
    """Return what sorts tokens into blocks, multiplies them by `op` and scales the products."""

    @functools.wraps(op)
    def blocked(values, ends, weight, chosen):
        choices, count = len(chosen), weight.codes.shape[0]
        blocks = expert_blocks(chosen, count, block_size(choices, count, least, most))
        repeats = choices // len(values)
        y = op(blocks.gather(values, repeats), weight, blocks.experts)
        y = y * weight.steps[blocks.experts][:, None]
        if ends:
            scale, zero_point = (blocks.gather(end, repeats)[..., None] for end in ends)
            y = scale * (y - zero_point * weight.row_sums[blocks.experts][:, None])
        return blocks.scatter(y[..., : weight.out_features].astype(out_dtype))

    return blocked
