"""The allocation is the exact optimum, and the table it comes from means what it says."""

import itertools
import json

import numpy as np
import pytest

from twla_jax.core import ila_amp
from twla_jax.core.ila_amp import SensitivityTable
from twla_jax.errors import TwlaError

pytestmark = pytest.mark.smoke

CHOICES = (2, 4, 6, 8)


def objective(costs, interactions, at, beta):
    total = sum(costs[site, i] for site, i in enumerate(at))
    return total + beta * sum(interactions[s, at[s], at[s + 1]] for s in range(len(at) - 1))


def brute_force(costs, interactions, weights, budget, choices, beta):
    """The least objective of all assignments within the budget, each looked at."""
    at = np.asarray(list(itertools.product(range(len(choices)), repeat=len(costs))))
    spent = np.asarray(choices)[at] @ weights
    at = at[spent <= budget * weights.sum() + 1e-9]
    total = costs[np.arange(len(costs)), at].sum(1)
    total += beta * interactions[np.arange(len(costs) - 1), at[:, :-1], at[:, 1:]].sum(1)
    return total.min()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_the_allocation_equals_brute_force(seed, beta):
    rng = np.random.default_rng([seed, round(2 * beta)])
    length = 8 if seed == 0 else int(rng.integers(1, 8))
    choices = (CHOICES, (2, 6, 8), (4, 6))[seed % 3] if seed else CHOICES
    costs = rng.normal(size=(length, len(choices)))
    interactions = rng.normal(size=(length - 1, len(choices), len(choices)))
    weights = (
        np.ones(length, np.int64),
        rng.choice([576, 1536, 11008], length),
        rng.integers(1, 50, length),
    )[seed % 3 if seed else 1]
    for budget in (choices[0], 4.0, rng.uniform(4, choices[-1]), choices[-1]):
        bits = ila_amp.allocate(costs, interactions, weights, budget, choices, beta)
        assert bits @ weights <= budget * weights.sum() + 1e-9
        at = [choices.index(b) for b in bits]
        best = brute_force(costs, interactions, weights, budget, choices, beta)
        np.testing.assert_allclose(objective(costs, interactions, at, beta), best, rtol=1e-12, atol=1e-12)


def test_interactions_change_what_is_chosen():
    """Two sites that are cheap alone and ruinous together, and a dear one: joint and independent part ways."""
    costs = np.array([[0.1, 0.0], [0.1, 0.0], [0.15, 0.0]])
    interactions = np.zeros((2, 2, 2))
    interactions[0, 0, 0] = 1.0
    arguments = (costs, interactions, np.ones(3, np.int64), 5.0, (4, 6))
    assert ila_amp.allocate(*arguments, beta=0.0).tolist() == [4, 4, 6]
    assert ila_amp.allocate(*arguments, beta=0.5).tolist()[2] == 4


def test_a_decimal_budget_is_not_rounded_away():
    """2.3 bits on 20 sites pay for three steps of 2 above 40, and in floats for 2.9999999999999982 of them."""
    costs = np.tile([[1.0, 0.0]], (20, 1))
    bits = ila_amp.allocate(costs, np.zeros((19, 2, 2)), np.ones(20, np.int64), 2.3, (2, 4))
    assert bits.sum() == 46


def test_a_model_of_128_sites_spends_its_budget_to_the_last_step():
    """A 7B model's inputs; costs in proportion to what bits save make every step of the budget worth its while."""
    rng = np.random.default_rng(0)
    weights = np.tile([4096, 4096, 4096, 11008], 32)
    costs = -np.asarray(CHOICES) * rng.uniform(1, 2, (128, 1))
    bits = ila_amp.allocate(costs, np.zeros((127, 4, 4)), weights, 4.0, CHOICES)
    assert 0 <= 4.0 * weights.sum() - bits @ weights < 2 * weights.min()


@pytest.mark.parametrize("budget", [1.9, 8.1, -4.0, float("nan"), float("inf")])
def test_an_infeasible_budget_is_refused_with_the_feasible_range(budget):
    arguments = (np.zeros((3, 4)), np.zeros((2, 4, 4)), np.ones(3, np.int64), budget, CHOICES)
    with pytest.raises(TwlaError, match="average between 2 and 8"):
        ila_amp.allocate(*arguments)
    with pytest.raises(TwlaError, match="average between 2 and 8"):
        ila_amp.uniform(3, budget, CHOICES)


def test_uniform_takes_the_most_bits_that_the_budget_pays_for_everywhere():
    assert ila_amp.uniform(3, 4.0, CHOICES).tolist() == [4, 4, 4]
    assert ila_amp.uniform(3, 5.9, CHOICES).tolist() == [4, 4, 4]


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return SensitivityTable.from_losses(
        CHOICES, 2.0, rng.uniform(2, 3, (4, 3)), rng.uniform(2, 4, (3, 3, 3)), {"seconds": 1.5}
    )


def test_costs_and_interactions_are_rises_that_add_up_to_the_losses(table):
    rng = np.random.default_rng(0)
    singles, pairs = rng.uniform(2, 3, (4, 3)), rng.uniform(2, 4, (3, 3, 3))
    assert table.predict(np.array([8, 8, 8, 8]), 1.0) == 2.0
    assert table.predict(np.array([8, 4, 8, 8]), 0.3) == pytest.approx(singles[1, 1])
    assert table.predict(np.array([8, 8, 6, 2]), 1.0) == pytest.approx(pairs[2, 2, 0])
    assert not table.costs[:, -1].any()
    assert not table.interactions[:, -1].any()
    assert not table.interactions[:, :, -1].any()


def test_a_table_survives_json_to_the_last_bit(table):
    for each in (table, SensitivityTable.from_losses((4, 8), 1.0, np.ones((1, 1)), np.ones((0, 1, 1)), {})):
        back = SensitivityTable.from_dict(json.loads(json.dumps(each.to_dict())))
        np.testing.assert_array_equal(back.costs, each.costs)
        np.testing.assert_array_equal(back.interactions, each.interactions)
        assert (back.choices, back.base_loss, back.effort) == (each.choices, each.base_loss, each.effort)


def test_a_loss_that_is_not_finite_makes_no_table():
    with pytest.raises(TwlaError, match="not finite"):
        SensitivityTable.from_losses((4, 8), 1.0, np.array([[np.nan], [1.0]]), np.ones((1, 1, 1)), {})
