"""The rotation keeps what the model computes, and the fit makes weights tri-modal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import kotms
from twla_jax.core.settings import RotationSettings

L, R = 6, 8


@pytest.fixture
def weight():
    return jax.random.t(jax.random.key(0), 4.0, (40, L * R)) * 0.02


def fit(weight, **settings):
    return kotms.fit_rotation(
        weight, jax.random.key(1), settings=RotationSettings(steps=60, **settings), sizes=(L, R)
    )


def test_it_is_the_kronecker_product(weight):
    rotation, _ = fit(weight, start="random")
    dense = np.kron(np.asarray(rotation.left, np.float64), np.asarray(rotation.right, np.float64).T)
    np.testing.assert_allclose(rotation(weight), np.asarray(weight, np.float64) @ dense.T, atol=1e-6)


def test_inner_products_are_kept_in_the_stored_dtype(weight):
    """W'x' = Wx up to the rounding of float16 factors."""
    rotation, _ = fit(weight, start="random")
    x = jax.random.normal(jax.random.key(2), (10, L * R))
    expected = np.asarray(x) @ np.asarray(weight).T
    got = np.asarray(rotation(x)) @ np.asarray(rotation(weight)).T
    assert np.linalg.norm(got - expected) < 2e-3 * np.linalg.norm(expected)


def test_moments_rotate_with_the_inputs(weight):
    rotation, _ = fit(weight, start="random")
    x = jax.random.normal(jax.random.key(2), (50, L * R))
    rotated = rotation(x)
    np.testing.assert_allclose(
        kotms.rotate_moment(x.T @ x, rotation), rotated.T @ rotated, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("start", ["random", "identity"])
@pytest.mark.parametrize("retraction", ["polar", "cayley"])
def test_the_fit_lowers_the_loss(weight, start, retraction):
    rotation, (before, after) = fit(weight, start=start, retraction=retraction)
    assert after < before - 0.01
    for factor in (rotation.left, rotation.right):
        error = np.asarray(factor, np.float64).T @ np.asarray(factor, np.float64) - np.eye(factor.shape[0])
        assert np.abs(error).max() < 2e-3  # float16 rounding of an orthogonal matrix


def test_a_fit_that_looks_at_the_input_narrows_its_range(weight):
    outliers = jnp.ones(L * R).at[jnp.array([3, 17])].set(30.0)
    sample = jax.random.normal(jax.random.key(3), (64, L * R)) * outliers

    def ranges(rotation):
        x = np.asarray(rotation(sample), np.float64)
        return np.log((np.ptp(x, axis=-1) ** 2 / (x**2).mean(-1)).mean())

    plain, aware = (
        kotms.fit_rotation(
            weight,
            jax.random.key(1),
            sample if share else None,
            settings=RotationSettings(steps=60, range_weight=share),
            sizes=(L, R),
        )[0]
        for share in (0.0, 1.0)
    )
    assert ranges(aware) < ranges(plain) - 0.1
    assert float(kotms.log_range(aware(sample))) == pytest.approx(ranges(aware), rel=1e-5)


def test_a_fit_on_some_rows_is_the_fit_of_those_rows(weight):
    fit_few = functools.partial(kotms.fit_rotation, key=jax.random.key(1), sizes=(L, R))
    some, losses = fit_few(weight, settings=RotationSettings(steps=3, rows=len(weight) // 3))
    alone, expected = fit_few(weight[::3], settings=RotationSettings(steps=3))
    np.testing.assert_array_equal(some.left, alone.left)
    np.testing.assert_array_equal(losses, expected)


def test_loss_is_the_published_likelihood():
    """Against the mixture density written out in float64; light tails, as the plain formula underflows at 38 sigma."""
    weight = jax.random.normal(jax.random.key(0), (40, L * R)) * 0.02
    rows = np.asarray(weight, np.float64)
    rows = rows - rows.mean(1, keepdims=True)
    c = np.abs(rows).mean(1, keepdims=True)
    modes = np.stack([-c, 0 * c, c], -1)
    sigma = 0.25 * c[..., None]
    density = np.exp(-0.5 * ((rows[..., None] - modes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    responsibilities = (density / density.sum(-1, keepdims=True)).mean((0, 1))
    expected = -np.log(density.mean(-1)).mean() + 0.1 * ((responsibilities - 1 / 3) ** 2).sum()
    assert float(kotms.tri_modal_loss(weight)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("m", "n", "rule", "sizes"),
    [
        (576, 576, "balanced", (24, 24)),
        (1536, 576, "balanced", (32, 48)),
        (11008, 4096, "balanced", (86, 128)),
        (576, 576, "paper", (8, 72)),
        (7, 3, "balanced", (1, 7)),
    ],
)
def test_factor_sizes(m, n, rule, sizes):
    assert kotms.factor_sizes(m, n, rule) == sizes
