"""From an input through a linear onto the residual stream, and on through its norm, gate and what it gates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from twla_jax.devices import gpu_obstacle
from twla_jax.ops.decode_attention import AttentionParts
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.linear_pair import gpu, reference
from twla_jax.ops.linear_pair.operands import LinearOperands


def linear_pair(
    x: Float[Array, "t m"] | AttentionParts,
    first: LinearOperands,
    second: LinearOperands,
    residual: Float[Array, "t n"],
    exchange: Int32[Array, "1 words"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "t n"], Float[Array, "t hidden"], Int32[Array, "1 words"] | None]:
    """`h = residual + quantized_linear(x)` and `quantized_linear(h, gated=True)`.

    For one token of a model of some size, a Hopper GPU does both in one kernel if there is an exchange; everywhere else
    it is those two ops.

    Args:
      x: as `quantized_linear` takes it.
      first, second: the linears'; of the second one, the weight is two matrices of one size.
      residual: outputs are of its type.
      exchange: from `new_exchange`, or as the last call returned it; None for two ops.
      implementation: as `quantized_linear` takes it.
    Returns:
      h, what the second linear makes of it, and the exchange for the next call.
    Raises:
      TwlaError: the implementation asked for cannot be used.
    """
    can = implementation in (None, "gpu") and not gpu_obstacle()
    if exchange is not None and can and gpu.obstacle(x, first, second, residual) is None:
        return gpu.linear_pair(x, first, second, residual, exchange)
    return *reference.linear_pair(x, first, second, residual, implementation=implementation), exchange


def new_exchange(
    tokens: int, first: LinearOperands, second: LinearOperands
) -> Int32[Array, "1 words"] | None:
    """What `linear_pair` needs to be one kernel for so many tokens; None where it cannot be one."""
    if gpu_obstacle():
        return None
    x, residual = jax.eval_shape(
        lambda: [
            jnp.zeros((tokens, n), first.rotation.left.dtype)
            for n in (first.weight.in_features, first.weight.out_features)
        ]
    )
    return None if gpu.obstacle(x, first, second, residual) else gpu.new_exchange(residual)
