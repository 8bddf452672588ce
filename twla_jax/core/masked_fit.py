"""Fits ternary codes to some elements of each row, as the published layout's groups need them.

`Ŵ = μ + α·T` with one plane, `Ŵ = μ + α₀·T₀ + α₁·T₁` with two, where a mask holds and 0 elsewhere. The steps are those
of the public TWLA code (arXiv 2606.13054): a Euclidean fit of the codes, then scales relocated under the inputs'
second moments. No array is larger than the block itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_HIGHEST = jax.lax.Precision.HIGHEST
_THRESHOLD = 0.75  # of the mean magnitude
_STEPS = 15

Scales = tuple[Float[Array, " n"], ...]  # μ, then an α for each plane
Codes = tuple[Float[Array, "n g"], ...]  # a plane each, in {-1, 0, 1}


def greedy(x: Float[Array, "n g"], mask: Bool[Array, "n g"], *, terms: int) -> Float[Array, "n g"]:
    """Return an approximation of x under the mask, `[n, g]`: ternary terms, each of what the ones before left.

    A term is the mean, a threshold of 0.75 of the mean magnitude, the codes it gives, and their least-squares α.
    """
    total = jnp.zeros_like(x)
    for _ in range(terms):
        mu, alpha, codes = _term(jnp.where(mask, x - total, 0), mask)
        total = total + jnp.where(mask, mu[:, None] + alpha[:, None] * codes, 0)
    return total


def euclidean_one_plane(w: Float[Array, "n g"], mask: Bool[Array, "n g"]) -> tuple[Scales, Codes]:
    """Return `((μ, α), (T,))` of each row's masked elements: stage 1 of E2M-ATQ, 15 rounds."""
    w = jnp.where(mask, w, 0)

    def assign(mu):
        centered = jnp.where(mask, w - mu[:, None], 0)
        codes = _codes(centered, mask)
        return _least_squares(codes, centered), codes

    def step(_, mu):
        alpha, codes = assign(mu)
        return mu + _mean(w - mu[:, None] - alpha[:, None] * codes, mask)

    mu = jax.lax.fori_loop(0, _STEPS, step, _mean(w, mask))
    alpha, codes = assign(mu)
    return (mu, alpha), (codes,)


def euclidean_two_planes(w: Float[Array, "n g"], mask: Bool[Array, "n g"]) -> tuple[Scales, Codes]:
    """Return `((μ, α₀, α₁), (T₀, T₁))` of each row's masked elements, from two greedy terms and 15 rounds.

    A round moves μ by the mean residual, then α₀ and α₁ by least squares, then every code to the nearest of the nine
    levels.
    """
    w = jnp.where(mask, w, 0)
    mu, alpha, first = _term(w, mask)
    residual = jnp.where(mask, w - mu[:, None] - alpha[:, None] * first, 0)
    second = _codes(residual, mask)
    state = (mu, alpha, _least_squares(second, residual), first, second)

    def step(_, state):
        mu, alpha, beta, first, second = state
        mu = mu + _mean(w - values((mu, alpha, beta), (first, second), mask), mask)
        centered = jnp.where(mask, w - mu[:, None], 0)
        alpha = _least_squares(first, centered - beta[:, None] * second)
        beta = _least_squares(second, centered - alpha[:, None] * first)
        first, second = _nearest(centered, alpha[:, None], beta[:, None], mask)
        return mu, alpha, beta, first, second

    mu, alpha, beta, first, second = jax.lax.fori_loop(0, _STEPS, step, state)
    return (mu, alpha, beta), (first, second)


def relocate(
    w: Float[Array, "n g"],
    mask: Bool[Array, "n g"],
    scales: Scales,
    codes: Codes,
    moment: Float[Array, "g g"],
) -> Scales:
    """Return scales of less output error `(w − ŵ)ᵀ S (w − ŵ)` over the masked elements, codes fixed.

    15 coordinate steps on (μ, α…), as published: each scale in turn to its optimum given the others. A row's products
    with S are formed once; `[n, g, g]` never is.
    """
    w = jnp.where(mask, w, 0)
    basis = jnp.stack([mask.astype(w.dtype), *codes])  # [scales, n, g]
    weighted = jnp.matmul(basis, moment, precision=_HIGHEST)
    gram = jnp.einsum("ing,jng->ijn", weighted, basis, precision=_HIGHEST)
    target = (weighted * w).sum(-1)

    def step(_, p):
        for i in range(len(basis)):
            others = (gram[i] * p).sum(0) - gram[i, i] * p[i]
            p = p.at[i].set((target[i] - others) / (gram[i, i] + 1e-10))
        return p

    return tuple(jax.lax.fori_loop(0, _STEPS, step, jnp.stack(scales)))


def values(scales: Scales, codes: Codes, mask: Bool[Array, "n g"]) -> Float[Array, "n g"]:
    """Return what codes and scales stand for, `[n, g]`, 0 outside the mask."""
    mu, *alphas = scales
    planes = (alpha[:, None] * plane for alpha, plane in zip(alphas, codes, strict=True))
    return jnp.where(mask, sum(planes, mu[:, None]), 0)


def _term(residual: Float[Array, "n g"], mask: Bool[Array, "n g"]) -> tuple[Array, Array, Array]:
    mu = _mean(residual, mask)
    centered = jnp.where(mask, residual - mu[:, None], 0)
    codes = _codes(centered, mask)
    return mu, _least_squares(codes, centered), codes


def _mean(x: Float[Array, "n g"], mask: Bool[Array, "n g"]) -> Float[Array, " n"]:
    return jnp.where(mask, x, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def _codes(centered: Float[Array, "n g"], mask: Bool[Array, "n g"]) -> Float[Array, "n g"]:
    delta = _THRESHOLD * _mean(jnp.abs(centered), mask)
    return jnp.where(mask, jnp.sign(centered) * (jnp.abs(centered) > delta[:, None]), 0)


def _least_squares(codes: Float[Array, "n g"], target: Float[Array, "n g"]) -> Float[Array, " n"]:
    return (codes * target).sum(-1) / (jnp.abs(codes).sum(-1) + 1e-8)


def _nearest(centered, alpha, beta, mask) -> tuple[Float[Array, "n g"], Float[Array, "n g"]]:
    """Return the pair of codes of the nearest of nine levels; ties go to the first pair in rising order."""
    best = jnp.full_like(centered, jnp.inf)
    first = second = jnp.zeros_like(centered)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            distance = jnp.abs(centered - (i * alpha + j * beta))
            nearer = distance < best
            best = jnp.where(nearer, distance, best)
            first, second = jnp.where(nearer, i, first), jnp.where(nearer, j, second)
    return jnp.where(mask, first, 0), jnp.where(mask, second, 0)
