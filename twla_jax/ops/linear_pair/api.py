"""Computes a linear onto the residual stream, then a norm and a gated linear: the public entry of this op."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from twla_jax.devices import gpu_obstacle
from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.linear_pair import gpu, reference
from twla_jax.ops.linear_pair.operands import LinearOperands


def linear_pair(
    x: Float[Array, "t m"] | AttentionSplits,
    first: LinearOperands,
    second: LinearOperands,
    residual: Float[Array, "t n"],
    exchange: Int32[Array, "1 words"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "t n"], Float[Array, "t hidden"], Int32[Array, "1 words"] | None]:
    """Return `h = residual + quantized_linear(x)`, `quantized_linear(h, gated=True)`, and the next exchange.

    For one token of a model of some size, a Hopper GPU does both in one kernel if there is an exchange; everywhere else
    it is those two ops.

    Args:
      x: as `quantized_linear` takes it.
      first: operands of the first linear.
      second: operands of the second linear, whose weight is two matrices of one size.
      residual: outputs have its dtype.
      exchange: from `new_pair_exchange`, or as the last call returned it; None for two ops.
      implementation: as `quantized_linear` takes it.

    Returns:
      h `[t, n]`, the second linear's outputs `[t, hidden]`, and the exchange for the next call.

    Raises:
      TwlaError: the requested implementation cannot be used.
    """
    can = implementation in (None, "gpu") and not gpu_obstacle()
    if exchange is not None and can and gpu.obstacle(x, first, second, residual) is None:
        return gpu.linear_pair(x, first, second, residual, exchange)
    return *reference.linear_pair(x, first, second, residual, implementation=implementation), exchange


def new_pair_exchange(
    tokens: int, first: LinearOperands, second: LinearOperands
) -> Int32[Array, "1 words"] | None:
    """Return the words `[1, words]` that `linear_pair` needs to be one kernel; None where it cannot be one."""
    if gpu_obstacle():
        return None
    x, residual = jax.eval_shape(
        lambda: [
            jnp.zeros((tokens, n), first.rotation.left.dtype)
            for n in (first.weight.in_features, first.weight.out_features)
        ]
    )
    return None if gpu.obstacle(x, first, second, residual) else gpu.new_pair_exchange(residual)
