"""Computes two quantised linears, of which the second reads what the first adds to the residual stream."""

from twla_jax.ops.linear_pair.api import linear_pair, new_pair_exchange
from twla_jax.ops.linear_pair.operands import LinearOperands

__all__ = ["LinearOperands", "linear_pair", "new_pair_exchange"]
