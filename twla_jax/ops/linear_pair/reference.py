"""Computes a pair of linears as two ops, one after the other."""

import dataclasses

from jaxtyping import Array, Float

from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.linear_pair.operands import LinearOperands
from twla_jax.ops.quantized_linear import quantized_linear


def linear_pair(
    x: Float[Array, "t m"] | AttentionSplits,
    first: LinearOperands,
    second: LinearOperands,
    residual: Float[Array, "t n"],
    *,
    implementation: Implementation | None,
) -> tuple[Float[Array, "t n"], Float[Array, "t hidden"]]:
    """Return what `quantized_linear` makes of x, and what it makes of that."""
    one, two = ({f.name: getattr(each, f.name) for f in dataclasses.fields(each)} for each in (first, second))
    options = {"out_dtype": residual.dtype, "implementation": implementation}
    h = quantized_linear(x, residual=residual, **one, **options)
    return h, quantized_linear(h, gated=True, **two, **options)
