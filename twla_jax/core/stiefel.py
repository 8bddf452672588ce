"""Optimises on the Stiefel manifold of square orthogonal matrices, as an optax transformation.

A point is `X` with `XᵀX = I` (`[..., n, n]`, leading axes are independent points); the tangent space at X is `{XΩ :
Ω = −Ωᵀ}`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Matrix = Float[Array, "*batch n n"]
_NEWTON_SCHULZ_STEPS = 12


def project(x: Matrix, direction: Matrix) -> Matrix:
    """Return the part of `direction` that is tangent at x, `X·skew(Xᵀ D)`: of a Euclidean gradient the Riemannian."""
    inner = _matmul(_t(x), direction)
    return _matmul(x, 0.5 * (inner - _t(inner)))


def retract_polar(x: Matrix, tangent: Matrix) -> Matrix:
    """Return the orthogonal matrix nearest to `X + ξ`, by Newton-Schulz iteration.

    It takes matrix products only, which are fast on every accelerator. It also pulls a point that has left the manifold
    back onto it, so that rounding errors do not add up over steps.
    """
    y = x + tangent
    # σ(X + ξ)² = 1 + σ(ξ)², so this bound brings every singular value into (0, 1], where the iteration converges. 12
    # steps reach float32 rounding for ‖ξ‖_F ≤ 30, far beyond any sensible step.
    y = y / jnp.sqrt(1 + jnp.square(tangent).sum((-2, -1), keepdims=True))
    return jax.lax.fori_loop(0, _NEWTON_SCHULZ_STEPS, lambda _, y: _newton_schulz(y), y)


def retract_qr(x: Matrix, tangent: Matrix) -> Matrix:
    """Return the Q factor of `X + ξ`, signs chosen so that the retraction of zero is X."""
    q, r = jnp.linalg.qr(x + tangent)
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0).astype(x.dtype)
    return q * signs[..., None, :]


def retract_cayley(x: Matrix, tangent: Matrix) -> Matrix:
    """Return `X (I − Ω/2)⁻¹ (I + Ω/2)` with `Ω = Xᵀξ`: the paper's Cayley map, taken at the current point.

    The map multiplies X, so on its own it would keep and add up every step's rounding error; one Newton-Schulz step
    takes it back.
    """
    omega = _matmul(_t(x), tangent)
    omega = 0.25 * (omega - _t(omega))  # half of the skew part
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    return _newton_schulz(_matmul(x, jnp.linalg.solve(eye - omega, eye + omega)))


RETRACTIONS: dict[str, Callable[[Matrix, Matrix], Matrix]] = {
    "polar": retract_polar,
    "qr": retract_qr,
    "cayley": retract_cayley,
}


def riemannian(
    inner: optax.GradientTransformation, retraction: Callable[[Matrix, Matrix], Matrix] = retract_polar
) -> optax.GradientTransformation:
    """Return an optax optimiser of orthogonal matrices `[..., n, n]`.

    The Euclidean gradient is projected to the tangent space, passed through `inner` (whose moments live in the
    ambient space), what comes out is projected again (which transports old momentum to the present point), and the
    step is retracted. The update returned is `R(X, ξ) − X`, so `optax.apply_updates` lands on the manifold.

    Args:
      inner: any transformation that yields a step, such as `optax.adam(1e-2)`.
      retraction: one of `RETRACTIONS`.
    Returns:
      A transformation over pytrees of `[..., n, n]` matrices; `update` needs `params`.
    """

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("riemannian() needs the current point: call update(updates, state, params)")
        steps, state = inner.update(jax.tree.map(project, params, updates), state, params)
        moved = jax.tree.map(lambda x, step: retraction(x, project(x, step)) - x, params, steps)
        return moved, state

    return optax.GradientTransformation(inner.init, update)


def random_orthogonal(key: jax.Array, n: int, batch: tuple[int, ...] = ()) -> Matrix:
    """Draw uniform (Haar) random orthogonal matrices, float32 `[*batch, n, n]`."""
    return jax.random.orthogonal(key, n, batch, dtype=jnp.float32)


def _newton_schulz(y: Matrix) -> Matrix:
    """Take one step towards the nearest orthogonal matrix; an error ε in `YᵀY − I` becomes `−3ε²/4`."""
    return 1.5 * y - 0.5 * _matmul(y, _matmul(_t(y), y))


def _t(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
