"""E2M-ATQ against the published recurrences, written down independently in numpy float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import e2m_atq, tensors

G = 24


def published_stage_one(w, steps=15):
    mu = w.mean(1)
    for step in range(steps + 1):
        centred = w - mu[:, None]
        delta = 0.75 * np.abs(centred).mean(1)
        codes = np.sign(centred) * (np.abs(centred) > delta[:, None])
        alpha = (codes * centred).sum(1) / np.maximum((codes**2).sum(1), 1)
        if step < steps:
            mu = mu + (w - alpha[:, None] * codes - mu[:, None]).mean(1)
    return alpha, mu, codes


def published_stage_two(w, codes, alpha, mu, s, steps):
    """The public code's alternating coordinate steps on (mu, alpha), one row at a time."""
    alpha, mu = alpha.copy(), mu.copy()
    one = np.ones(w.shape[1])
    for i, (row, t) in enumerate(zip(w, codes, strict=True)):
        for _ in range(steps):
            mu[i] = one @ s @ (row - alpha[i] * t) / (one @ s @ one)
            alpha[i] = t @ s @ (row - mu[i]) / (t @ s @ t)
    return alpha, mu


def output_error(w, codes, alpha, mu, s):
    e = w - alpha[:, None] * codes - mu[:, None]
    return np.einsum("ni,ij,nj->n", e, s, e)


@pytest.fixture
def group():
    rng = np.random.default_rng(0)
    w = rng.standard_t(4, (32, G)) + 0.3
    x = rng.normal(size=(100, G)) @ rng.normal(size=(G, G)) + 0.5
    return w, x.T @ x


def fit(w, mask=None):
    mask = np.ones(w.shape[1], bool) if mask is None else mask
    return e2m_atq.euclidean_fit(jnp.asarray(w, jnp.float32), jnp.asarray(mask))


def relocate(w, codes, alpha, mu, s):
    arrays = (jnp.asarray(a, jnp.float32) for a in (w, codes, alpha, mu, s))
    return e2m_atq.relocate(*arrays, jnp.ones(w.shape[1], bool))


def test_euclidean_fit_is_the_published_recurrence(group):
    w, _ = group
    alpha, mu, codes = fit(w)
    expected_alpha, expected_mu, expected_codes = published_stage_one(w)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(alpha, expected_alpha, rtol=1e-5)
    np.testing.assert_allclose(mu, expected_mu, rtol=1e-5, atol=1e-6)


def test_relocation_is_the_limit_of_the_published_steps(group):
    w, s = group
    alpha, mu, codes = published_stage_one(w)
    expected_alpha, expected_mu = published_stage_two(w, codes, alpha, mu, s, steps=500)
    new_alpha, new_mu = relocate(w, codes, alpha, mu, s)
    np.testing.assert_allclose(new_alpha, expected_alpha, rtol=1e-3)
    np.testing.assert_allclose(new_mu, expected_mu, rtol=1e-3, atol=1e-4)


def test_relocation_reaches_at_least_what_fifteen_published_steps_reach(group):
    w, s = group
    alpha, mu, codes = published_stage_one(w)
    published = output_error(w, codes, *published_stage_two(w, codes, alpha, mu, s, steps=15), s)
    ours = output_error(w, codes, *(np.asarray(p, np.float64) for p in relocate(w, codes, alpha, mu, s)), s)
    assert (ours <= published * (1 + 1e-5)).all()


@pytest.mark.parametrize("seed", range(5))
def test_relocation_never_raises_the_output_error(seed):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(64, G)) * 10.0 ** rng.integers(-4, 2, (64, 1))
    x = rng.normal(size=(6, G))  # fewer tokens than columns: S is singular
    s = x.T @ x
    alpha, mu, codes = (np.asarray(p, np.float64) for p in fit(w))
    before = output_error(w, codes, alpha, mu, s)
    new_alpha, new_mu = relocate(w, codes, alpha, mu, s)
    after = output_error(w, codes, np.asarray(new_alpha, np.float64), np.asarray(new_mu, np.float64), s)
    scale = np.einsum("ni,ij,nj->n", w, s, w)
    assert (after <= before + 1e-6 * scale).all()


def test_a_row_with_equal_codes_keeps_finite_scales():
    w = np.full((2, G), 0.25)
    w[1] = 0
    alpha, mu, codes = fit(w)
    new = relocate(w, codes, alpha, mu, np.eye(G))
    assert np.isfinite(np.asarray(new)).all()
    np.testing.assert_allclose(new[0][:, None] * codes + new[1][:, None], w, atol=1e-6)


def test_masked_columns_do_not_touch_the_fit(group):
    w, _ = group
    short = fit(w[:, :10])
    padded = np.pad(w[:, :10], ((0, 0), (0, 5)), constant_values=99.0)
    masked = fit(padded, np.arange(15) < 10)
    np.testing.assert_array_equal(masked[2][:, :10], short[2])
    assert not masked[2][:, 10:].any()
    np.testing.assert_allclose(masked[0], short[0], rtol=1e-5)


@pytest.mark.parametrize(("m", "group_size"), [(576, 128), (172, 172), (40, 16)])
def test_dequantize_applies_each_groups_scale(m, group_size):
    rng = np.random.default_rng(0)
    groups = -(-m // group_size)
    codes = rng.integers(-1, 2, (2, 8, m)).astype(np.int8)
    alpha, mu = (rng.normal(size=(2, 8, groups)).astype(np.float16) for _ in range(2))
    tensor = tensors.from_codes(jnp.asarray(codes), jnp.asarray(alpha), jnp.asarray(mu), group_size)
    column_group = np.arange(m) // group_size
    expected = alpha.astype(np.float32)[..., column_group] * codes + mu.astype(np.float32)[..., column_group]
    assert tensor.shape == (2, 8, m)
    np.testing.assert_allclose(tensors.dequantize(tensor), expected, rtol=1e-6, atol=1e-6)
    one = tensors.from_codes(*(jnp.asarray(each[0]) for each in (codes, alpha, mu)), group_size)
    x = rng.normal(size=(3, m)).astype(np.float32)
    np.testing.assert_allclose(
        tensors.packed_matmul(jnp.asarray(x), one), x @ expected[0].T, rtol=1e-4, atol=1e-4
    )


def test_whole_steps_fit_int8_lie_near_and_stay():
    rng = np.random.default_rng(0)
    alpha = rng.uniform(0.5, 1.5, (4096, 32)) * np.exp(rng.normal(size=(4096, 1)))
    mu = alpha * rng.normal(size=alpha.shape) * 0.2
    near = tensors.in_whole_steps(jnp.asarray(alpha), jnp.asarray(mu), 128)
    stored = [np.asarray(part).astype(np.float16).astype(np.float64) for part in near]
    step = np.asarray(tensors.row_steps(*map(jnp.asarray, stored)), np.float64)[:, None]
    largest = (np.abs(alpha) + np.abs(mu)).max(axis=1, keepdims=True)
    for part, exact in zip(stored, (alpha, mu), strict=True):
        np.testing.assert_array_equal(part / step, np.round(part / step))
        assert (np.abs(part - exact) <= 0.0045 * largest).all()
    assert (np.abs(stored[0]) + np.abs(stored[1]) <= 127 * step).all()
    again = tensors.in_whole_steps(*map(jnp.asarray, stored), 128)
    np.testing.assert_array_equal(np.asarray(again), stored)


@pytest.mark.parametrize(("groups", "group_size"), [(1, 128), (4, 32)])
def test_scales_that_no_kernel_adds_up_stay(groups, group_size):
    alpha, mu = jnp.linspace(0.1, 0.2, groups)[None], jnp.linspace(0.03, 0.04, groups)[None]
    near = tensors.in_whole_steps(alpha, mu, group_size)
    np.testing.assert_array_equal(near, (alpha, mu))
