"""Defines what refinement learns of two planes: one latent a weight, in units of the mean step between nine levels.

    T = nearest digit to u among the levels as they were at the start,    Ŵ = values(T; α₁, α₂, μ),    ∂Ŵ/∂u := unit

so that codes change by their own gradient alone, not because a scale moved.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twla_jax.core import packing, two_planes
from twla_jax.core.tensors import TernaryTensor, per_column

_MARGIN = 0.9  # of the way from its level to the edge of its cell, at most, that a latent starts
_REACH = 0.5  # beyond the outermost level that a latent still passes gradients


def unit(tensor: TernaryTensor) -> Float[Array, "*batch n groups"]:
    """Return `(|α₁| + |α₂|)/4`, an eighth of the range; 1 where both are 0."""
    assert tensor.residual_alpha is not None  # there are two planes
    size = (jnp.abs(tensor.alpha.astype(jnp.float32)) + jnp.abs(tensor.residual_alpha)) / 4
    return jnp.where(size == 0, 1, size)


def start(rows: Float[Array, "n m"], tensor: TernaryTensor) -> Float[Array, "n m"]:
    """Return u where the full-precision weight lies, but inside the cell of the code that the tensor has."""
    levels = _levels(tensor)
    current = two_planes.values(_digits(tensor), *levels, jnp.float32(0))
    lower, upper = jnp.full_like(rows, -jnp.inf), jnp.full_like(rows, jnp.inf)
    for digit in range(-4, 5):
        level = two_planes.values(jnp.float32(digit), *levels, jnp.float32(0))
        lower = jnp.where(level < current, jnp.maximum(lower, level), lower)
        upper = jnp.where(level > current, jnp.minimum(upper, level), upper)
    # Beyond the outermost level no further than gradients pass.
    lower = jnp.where(jnp.isinf(lower), current - 1, lower)
    upper = jnp.where(jnp.isinf(upper), current + 1, upper)
    mu, size = (_columns(p.astype(jnp.float32), tensor) for p in (tensor.offsets(), unit(tensor)))
    step = (rows - mu) / size - current
    return current + jnp.clip(step, -_MARGIN * (current - lower) / 2, _MARGIN * (upper - current) / 2)


def codes(u: Float[Array, "*batch n m"] | None, tensor: TernaryTensor) -> Float[Array, "*batch n m"]:
    """Return the digits that latents stand for; without latents those that the tensor has."""
    if u is None:
        return _digits(tensor)
    return two_planes.nearest_codes(u, *_levels(tensor), jnp.float32(0))


def dense(
    u: Float[Array, "n m"] | None,
    tensor: TernaryTensor,
    alphas: tuple[Float[Array, "n groups"], ...],
    mu: Float[Array, "n groups"] | None,
) -> Float[Array, "n m"]:
    """Return Ŵ under latents and scales `(α₁, α₂)` and μ, through whose codes gradients pass straight."""
    alpha, residual_alpha = (_columns(p, tensor) for p in alphas)
    scales = alpha, residual_alpha, 0.0 if mu is None else _columns(mu, tensor)
    if u is None:
        return two_planes.values(_digits(tensor), *scales)
    first, second = _levels(tensor)
    within = jnp.abs(u) < jnp.abs(first) + jnp.abs(second) + _REACH
    passed = jnp.where(within, u, jax.lax.stop_gradient(u))
    hard = two_planes.values(jax.lax.stop_gradient(codes(u, tensor)), *scales)
    return hard + _columns(unit(tensor), tensor) * (passed - jax.lax.stop_gradient(passed))


def _levels(tensor: TernaryTensor) -> tuple[Float[Array, "*batch n m"], Float[Array, "*batch n m"]]:
    """Return `(α₁, α₂)` of every column in units, as the tensor has them."""
    size = unit(tensor)
    assert tensor.residual_alpha is not None
    first, second = (p.astype(jnp.float32) / size for p in (tensor.alpha, tensor.residual_alpha))
    return _columns(first, tensor), _columns(second, tensor)


def _digits(tensor: TernaryTensor) -> Float[Array, "*batch n m"]:
    first, second = (
        packing.unpack(plane.codes, tensor.in_features).astype(jnp.float32) - 1 for plane in tensor.planes()
    )
    return 3 * first + second


def _columns(parameter: Float[Array, "*batch n groups"], tensor: TernaryTensor) -> Float[Array, "*batch n m"]:
    return per_column(parameter, tensor.in_features, tensor.group_size)
