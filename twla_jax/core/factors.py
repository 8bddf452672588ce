"""Factors the second moments of inputs for the column sweep: `H = S/t + λI = R Rᵀ`, R upper triangular, `U = R⁻¹`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from twla_jax.core.settings import WeightSettings

_DAMPING_TRIES = 6


class Factors(NamedTuple):
    """Holds what a sweep takes of the factors of `H = R Rᵀ`.

    Attributes:
      inverse: `U = R⁻¹`, upper triangular; `padded` is m filled up to whole groups.
      roots: the diagonal blocks of R, one a group.
      damping: see `factor`.
    """

    inverse: Float[Array, "padded padded"]
    roots: Float[Array, "groups g g"]
    damping: Float[Array, ""]


def factor_groups(mean_moment: Float[Array, "m m"], settings: WeightSettings) -> Factors:
    """Return the factors of the damped `S/t` that `sweep_columns` takes."""
    group, padded = group_and_padded(len(mean_moment), settings)
    exists = jnp.arange(padded) < len(mean_moment) if padded > len(mean_moment) else None
    damping = settings.compensation.damping if settings.compensation else 0.0
    root, inverse, damping = factor(padded_moment(mean_moment, padded, settings), exists, damping)
    roots = jax.lax.map(
        lambda start: jax.lax.dynamic_slice(root, (start, start), (group, group)),
        jnp.arange(0, padded, group),
    )
    return Factors(inverse, roots, damping)


def factor(
    mean_moment: Float[Array, "m m"], exists: Bool[Array, " m"] | None, damping: Float[Array, ""] | float
) -> tuple[Float[Array, "m m"], Float[Array, "m m"], Float[Array, ""]]:
    """Return `(R, U, damping)` of `H = S/t + damping·mean(diag S/t)·I`: `H = R Rᵀ`, R upper triangular, `U = R⁻¹`.

    H is damped before it is factored; where the factorisation still fails the damping is raised tenfold and only
    then. Columns that do not exist (padding) are decoupled.

    Args:
      mean_moment: `S/t`.
      exists: which columns are no padding; None if none is, which spares a copy of `S/t`.
      damping: share of the mean diagonal to begin with.
    """
    m = len(mean_moment)
    if exists is None:
        h, exists = mean_moment, jnp.ones(m, bool)
    else:
        both = exists[:, None] & exists[None, :]
        h = jnp.where(both, mean_moment, jnp.diag((~exists).astype(jnp.float32)))
    scale = jnp.where(exists, jnp.diagonal(h), 0).sum() / exists.sum()
    scale = jnp.where(scale > 0, scale, 1.0)  # inputs that are always zero: any positive H will do

    def attempt(state):
        _, damping, tries = state
        damped = h + jnp.diag(jnp.where(exists, damping * scale, 0))
        # `cholesky` makes it symmetric, so it may be turned: then it lies as LAPACK takes it, without a copy of h.
        return jnp.linalg.cholesky(damped.T[::-1, ::-1])[::-1, ::-1], damping * 10, tries + 1

    def failed(state):
        root, _, tries = state
        return (tries == 0) | ((tries < _DAMPING_TRIES) & ~jnp.isfinite(root).all())

    # The first attempt is one of the loop's: outside it, its root would exist beside the loop's own.
    root, next_damping, _ = jax.lax.while_loop(failed, attempt, (jnp.zeros_like(h), jnp.float32(damping), 0))
    inverse = jax.scipy.linalg.solve_triangular(root, jnp.eye(m), lower=False)
    return root, inverse, next_damping / 10


def group_and_padded(m: int, settings: WeightSettings) -> tuple[int, int]:
    """Return the columns of a group, and m filled up to whole groups."""
    group = settings.group_size or m
    return group, -(-m // group) * group


def padded_moment(
    mean_moment: Float[Array, "m m"], padded: int, settings: WeightSettings
) -> Float[Array, "p p"]:
    """Return `S/t` filled up with zeros; without compensation, as if no two inputs had to do with each other."""
    if settings.compensation is None:
        return jnp.eye(padded)
    return jnp.pad(mean_moment, (0, padded - len(mean_moment)))


def mean_diagonal(moment: Float[Array, "m m"]) -> Float[Array, ""]:
    """Return what a damping is a share of; 1 for inputs that are always zero, where any positive H will do."""
    mean = jnp.diagonal(moment).mean()
    return jnp.where(mean > 0, mean, 1.0)
