"""Computes the end of a product of quantised tokens with ternary weights."""

import jax

from twla_jax.ops.hopper.threads import Real


def rescale[Number: (jax.Array, Real)](
    product: Number, scale: Number, zero_point: Number, row_sum: Number, bias: Number | None
) -> Number:
    """Return `y = scale·(product − zero_point·row_sum) + bias`, the product of x̂ with Ŵ.

    `product` is `Σ_k Ŵ[r, k]·codes[k]`, already in the weights' own units: integer sums times the step of their row.
    The formula is the same on whole arrays (Pallas) and on a thread's numbers (`hopper.threads`).

    Args:
      product: of a row of Ŵ with a token's codes.
      scale: of the token.
      zero_point: of the token.
      row_sum: `Σ_k Ŵ[r, k]` of the row.
      bias: of the row; None for none.
    """
    y = scale * (product - zero_point * row_sum)
    return y if bias is None else y + bias
