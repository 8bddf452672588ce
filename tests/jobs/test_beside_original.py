"""What the page about a model shows of rotations: how peaked inputs are, and how weights are distributed."""

import numpy as np
import pytest
import scipy.linalg

from twla_jax.jobs import beside_original


def test_a_peak_is_spread_by_a_hadamard_matrix():
    tokens = np.zeros((2, 3, 16), np.float32)
    tokens[0, :2, 5] = 3.0  # the third is a window that only fills up a batch
    tokens[1, :] = np.sign(np.arange(16) - 7.5)
    assert beside_original.peak(tokens) == pytest.approx([4.0, 1.0])  # √16, and none higher than another
    assert beside_original.peak(tokens @ scipy.linalg.hadamard(16) / 4)[0] == pytest.approx(1.0)


def test_a_density_is_of_weights_in_units_of_their_group():
    rng = np.random.default_rng(0)
    scales = np.exp(rng.normal(size=(50, 2, 1)))
    rows = (rng.choice([-1.0, 1.0], (50, 2, 16)) * scales).reshape(50, 32)
    rows = np.concatenate([rows, np.full((50, 3), 7.0)], axis=1)  # no whole group
    found = beside_original.density(rows, 16, np.asarray([-1.5, -0.5, 0.5, 1.5]))
    share = (np.sign(rows[:, :32]) < 0).mean()
    assert found == pytest.approx([share, 0.0, 1 - share])
