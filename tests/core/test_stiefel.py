"""The retractions keep points on the manifold, and the optimiser finds the nearest rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from twla_jax.core import stiefel

RETRACTIONS = pytest.mark.parametrize("name", sorted(stiefel.RETRACTIONS))


def orthogonality_error(x):
    x = np.asarray(x, np.float64)
    return np.abs(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1])).max()


def tangent(x, scale, seed=0):
    return scale * stiefel.project(x, jax.random.normal(jax.random.key(seed), x.shape))


@pytest.fixture
def point():
    return stiefel.random_orthogonal(jax.random.key(1), 24)


def test_projection_is_tangent_and_idempotent(point):
    direction = tangent(point, 1.0)
    inner = point.T @ direction
    np.testing.assert_allclose(inner, -inner.T, atol=1e-5)
    np.testing.assert_allclose(stiefel.project(point, direction), direction, atol=1e-5)


@RETRACTIONS
def test_retraction_stays_on_the_manifold_even_for_long_steps(name, point):
    for scale in (0.0, 0.01, 1.0):
        assert orthogonality_error(stiefel.RETRACTIONS[name](point, tangent(point, scale))) < 5e-6


@RETRACTIONS
def test_retraction_agrees_with_the_tangent_to_first_order(name, point):
    step = tangent(point, 1e-3)
    moved = stiefel.RETRACTIONS[name](point, step) - point
    # second-order: the difference shrinks with the square of the step
    assert float(jnp.linalg.norm(moved - step)) < 2 * float(jnp.linalg.norm(step)) ** 2 + 1e-5


@RETRACTIONS
def test_500_steps_solve_procrustes_and_stay_orthogonal(name):
    """max ⟨X, A⟩ over rotations has the closed form UVᵀ of A's SVD."""
    target = np.random.default_rng(0).normal(size=(16, 16))
    u, _, vt = np.linalg.svd(target)
    best = u @ vt
    start = jnp.asarray(
        best @ np.asarray(stiefel.retract_polar(jnp.eye(16), tangent(jnp.eye(16), 0.3))), jnp.float32
    )
    optimizer = stiefel.riemannian(optax.adam(1e-2), stiefel.RETRACTIONS[name])

    def step(carry, _):
        x, state = carry
        gradient = jax.grad(lambda x: -(x * target).sum())(x)
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), None

    (x, _), _ = jax.jit(lambda s: jax.lax.scan(step, (s, optimizer.init(s)), length=500))(start)
    assert orthogonality_error(x) <= 1e-5
    assert (np.asarray(x) * target).sum() > (best * target).sum() * (1 - 1e-3)


def test_the_point_is_required(point):
    optimizer = stiefel.riemannian(optax.sgd(0.1))
    with pytest.raises(ValueError, match="params"):
        optimizer.update(point, optimizer.init(point))
