"""Chooses the bits of every activation site under a budget, knowing what neighbours cost each other (ILA-AMP).

TWLA, arXiv 2606.13054, section 3. A site is whatever gets bits of its own; sites stand in execution order.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from twla_jax.core.arrays import AnyArray
from twla_jax.errors import TwlaError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityTable:
    """What fewer bits cost: the loss with every site at the highest choice, and the rises from there.

    `costs[l, i]` is `C_l(b_i) = loss(l at b_i) − base_loss`; `interactions[l − 1, i, j]` is `K_{l−1,l}(b_i, b_j) =
    loss(l − 1 at b_i, l at b_j) − base_loss − C_{l−1}(b_i) − C_l(b_j)`. Both are 0 where a site is at the highest
    choice.

    Attributes:
      choices: bits, ascending; the last is the base that every other site stays at.
      base_loss: nats per token.
      effort: what the measurement took, for the report.
    """

    choices: tuple[int, ...]
    base_loss: float
    costs: Float[np.ndarray, "l c"]
    interactions: Float[np.ndarray, "l-1 c c"]
    effort: dict[str, Any]

    @classmethod
    def from_losses(
        cls,
        choices: Sequence[int],
        base_loss: float,
        singles: Float[np.ndarray, "l lower"],
        pairs: Float[np.ndarray, "l-1 lower lower"],
        effort: dict[str, Any],
    ) -> "SensitivityTable":
        """Return the table from losses at every choice but the base.

        Args:
          choices: bits, ascending.
          base_loss: with every site at the last choice, nats per token.
          singles: of single sites.
          pairs: of neighbours together.
          effort: what the measurement took.

        Raises:
          TwlaError: a loss that is not finite.
        """
        if not all(np.isfinite(losses).all() for losses in (base_loss, singles, pairs)):
            raise TwlaError("a loss of the sensitivity table is not finite: the model or its dtype overflows")
        costs = np.pad(singles - base_loss, ((0, 0), (0, 1)))
        inner = pairs - base_loss - costs[:-1, :-1, None] - costs[1:, None, :-1]
        return cls(
            choices=tuple(choices),
            base_loss=float(base_loss),
            costs=costs,
            interactions=np.pad(inner, ((0, 0), (0, 1), (0, 1))),
            effort=effort,
        )

    def predict(self, bits: Int[np.ndarray, " l"], beta: float) -> float:
        """Return the loss that `base_loss + Σ C_l + β Σ K_{l−1,l}` gives an allocation."""
        at = np.searchsorted(self.choices, bits)
        sites = np.arange(len(at))
        singles = self.costs[sites, at].sum()
        pairs = self.interactions[sites[:-1], at[:-1], at[1:]].sum()
        return float(self.base_loss + singles + beta * pairs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, exact to the last bit; `from_dict` is its inverse."""
        return {
            **dataclasses.asdict(self),
            "costs": self.costs.tolist(),
            "interactions": self.interactions.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SensitivityTable":
        """Return the table that `to_dict` wrote."""
        choices, length = tuple(values["choices"]), len(values["costs"])
        arrays = {
            "costs": np.asarray(values["costs"], np.float64),
            # An empty list of pairs does not say how wide they are.
            "interactions": np.asarray(values["interactions"], np.float64).reshape(
                length - 1, len(choices), len(choices)
            ),
        }
        return cls(**{**values, "choices": choices, **arrays})


def allocate(
    costs: Float[AnyArray, "l c"],
    interactions: Float[AnyArray, "l-1 c c"],
    weights: Int[np.ndarray, " l"],
    budget: float,
    choices: Sequence[int],
    beta: float = 0.5,
) -> Int[AnyArray, " l"]:
    """Return the bits `[l]` that minimise `Σ C_l(b_l) + β Σ K_{l−1,l}(b_{l−1}, b_l)` within a budget.

    The budget is `Σ w_l b_l ≤ budget · Σ w_l` (TWLA, arXiv 2606.13054, section 3).

    Exact: dynamic programming over (site, bits of the last site, budget used). The budget is counted in whole steps,
    `weights` and the choices' distances each divided by their greatest common divisor, so nothing is rounded. It runs
    on the host in float64, also for tables that `jax.jit` traces.

    Args:
      costs: `C`, a column a choice.
      interactions: `K`; zeros, or `beta` 0, treat the sites as independent.
      weights: what one bit of each site counts for: elements or multiply-adds, whole and positive.
      budget: bits on average.
      choices: bits, ascending.
      beta: weight of the interactions.
    Raises:
      TwlaError: a budget outside what the choices can give; says what they can.
    """
    check_budget(budget, choices)
    if isinstance(costs, Tracer) or isinstance(interactions, Tracer):
        bits = jax.ShapeDtypeStruct((len(costs),), np.int32)

        def on_host(costs, interactions):
            tables = [np.asarray(table, np.float64) for table in (costs, interactions)]
            return _allocate(tables[0], tables[1], weights, budget, choices, beta).astype(np.int32)

        return jax.pure_callback(on_host, bits, costs, interactions, vmap_method="sequential")
    return _allocate(np.asarray(costs), np.asarray(interactions), weights, budget, choices, beta)


def _allocate(costs, interactions, weights, budget, choices, beta) -> Int[np.ndarray, " l"]:
    low = choices[0]
    step = math.gcd(*(bits - low for bits in choices)) or 1
    shares = np.asarray(weights, np.int64) // np.gcd.reduce(np.asarray(weights, np.int64))
    used = shares[:, None] * ((np.asarray(choices) - low) // step)
    size = min(_whole_steps(budget, low, step, int(shares.sum())), int(used[:, -1].sum())) + 1

    # value[i, u]: the least objective so far with the last site at choice i and u steps used.
    value = np.full((len(choices), size), np.inf)
    for i, u in enumerate(used[0]):
        if u < size:
            value[i, u] = costs[0, i]
    came_from = []
    for site in range(1, len(costs)):
        arrived = value[:, None, :] + beta * interactions[site - 1][:, :, None]
        came_from.append(arrived.argmin(0).astype(np.int8))
        best, value = arrived.min(0), np.full_like(value, np.inf)
        for i, u in enumerate(used[site]):
            value[i, u:] = best[i, : max(size - u, 0)] + costs[site, i]

    chosen = np.zeros(len(costs), np.int64)
    chosen[-1], left = np.unravel_index(value.argmin(), value.shape)
    for site in range(len(costs) - 1, 0, -1):
        left -= used[site, chosen[site]]
        chosen[site - 1] = came_from[site - 1][chosen[site], left]
    return np.asarray(choices)[chosen]


def uniform(length: int, budget: float, choices: Sequence[int]) -> Int[np.ndarray, " l"]:
    """Return the most bits that every site can have alike within the budget, `[l]`; raises as `allocate`."""
    check_budget(budget, choices)
    return np.full(length, max(bits for bits in choices if bits <= budget))


def average_bits(bits: Int[np.ndarray, " l"], weights: Int[np.ndarray, " l"]) -> float:
    """Return `Σ w_l b_l / Σ w_l`."""
    return float(np.dot(bits, weights) / np.sum(weights))


def check_budget(budget: float, choices: Sequence[int]) -> None:
    """Refuse a budget that no allocation meets or that none can spend.

    Raises:
      TwlaError: says the feasible range.
    """
    if not choices[0] <= budget <= choices[-1]:  # also when it is NaN
        listed = ", ".join(map(str, choices))
        raise TwlaError(
            f"budget {budget:g}: bits of {listed} average between {choices[0]} and {choices[-1]}; choose within that"
        )


def _whole_steps(budget: float, low: int, step: int, total: int) -> int:
    """Return the steps above the lowest choice that a budget pays for; 3.3 means 33/10, not the float next to it."""
    return math.floor((Fraction(str(float(budget))) - low) * total / step)
