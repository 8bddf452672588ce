"""Fits two ternary planes: `Ŵ = α₁·T₁ + α₂·T₂ + μ`, nine levels a group, as PTQTP has it.

The pair of codes is kept as one digit `T = 3·T₁ + T₂ ∈ {-4, …, 4}` until it is packed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

_HIGHEST = jax.lax.Precision.HIGHEST
# (α₁, α₂) in standard deviations of a row, best for: three separate modes, a Gaussian, a Laplacian.
_STARTS = ((1.2, 0.35), (1.45, 0.95), (1.75, 1.2))

Broadcast = Float[Array, "*#shape"] | float
Scales = tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " n"]]


def split(codes: Num[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Return `(T₁, T₂)` of the digits `3·T₁ + T₂`, in their shape."""
    first = jnp.round(codes / 3)
    return first, codes - 3 * first


def values(
    codes: Num[Array, "*#shape"],
    alpha: Broadcast,
    residual_alpha: Broadcast,
    mu: Broadcast,
) -> Float[Array, "*#shape"]:
    """Return the levels that digits stand for, in their shape."""
    first, second = split(codes)
    return alpha * first + residual_alpha * second + mu


def nearest_codes(
    w: Float[Array, "*shape"],
    alpha: Broadcast,
    residual_alpha: Broadcast,
    mu: Broadcast,
) -> Float[Array, "*shape"]:
    """Return the digit of the level nearest to w, of all nine: for each T₁ the best T₂, then the best of three."""
    centred = w - mu
    divisor = jnp.where(residual_alpha == 0, jnp.inf, residual_alpha)

    def candidate(first):
        residual = centred - alpha * first
        second = jnp.clip(jnp.round(residual / divisor), -1, 1)
        return jnp.abs(residual - residual_alpha * second), 3 * first + second

    best, codes = candidate(0.0)
    for first in (-1.0, 1.0):
        error, other = candidate(first)
        codes = jnp.where(error < best, other, codes)
        best = jnp.minimum(error, best)
    return codes


def ordered(codes: Float[Array, "n g"], scales: Scales) -> tuple[Float[Array, "n g"], Scales]:
    """Return digits `[n, g]` and scales of the same levels with `α₁ ≥ α₂ ≥ 0`: signs go to the codes."""
    alpha, residual_alpha, mu = scales
    first, second = split(codes)
    first, second = (jnp.where(p[:, None] < 0, -t, t) for p, t in ((alpha, first), (residual_alpha, second)))
    alpha, residual_alpha = jnp.abs(alpha), jnp.abs(residual_alpha)
    swap = residual_alpha > alpha
    codes = jnp.where(swap[:, None], 3 * second + first, 3 * first + second)
    return codes, (jnp.maximum(alpha, residual_alpha), jnp.minimum(alpha, residual_alpha), mu)


def euclidean_fit(
    w: Float[Array, "n g"], mask: Bool[Array, " g"], *, steps: int = 15
) -> tuple[Scales, Float[Array, "n g"]]:
    """Fit both planes to each row of one group `[n, g]` in the weights' own metric.

    From each of three starts, `steps` alternations of the nearest of the nine levels and of least squares for
    (α₁, α₂, μ), neither of which raises the error; the best of the three is kept, row by row.

    Args:
      w: weights of one group, a row an output.
      mask: which columns exist; a short last group is padded to the group size.
      steps: alternations from each start.
    Returns:
      `((α₁, α₂, μ), digits)`.
    """
    w = jnp.where(mask, w, 0)
    count = mask.sum()
    mean = w.sum(-1) / count
    deviation = jnp.sqrt((jnp.square(w - mean[:, None]) * mask).sum(-1) / count)

    def digits(scales):
        return jnp.where(mask, nearest_codes(w, *(s[:, None] for s in scales)), 0)

    def descend(start):
        scales = (start[0] * deviation, start[1] * deviation, mean)
        scales = jax.lax.fori_loop(0, steps, lambda _, s: relocate(w, digits(s), s, None, mask), scales)
        codes = digits(scales)
        error = (jnp.square(w - values(codes, *(s[:, None] for s in scales))) * mask).sum(-1)
        return scales, codes, error

    scales, codes, errors = jax.lax.map(descend, jnp.asarray(_STARTS))
    best, rows = errors.argmin(0), jnp.arange(len(w))
    alpha, residual_alpha, mu = (s[best, rows] for s in scales)
    return (alpha, residual_alpha, mu), codes[best, rows]


def relocate(
    w: Float[Array, "n g"],
    codes: Float[Array, "n g"],
    scales: Scales,
    metric: Float[Array, "g g"] | None,
    mask: Bool[Array, " g"],
) -> Scales:
    """Move (α₁, α₂, μ), `[n]` each, to the least output error `(w − ŵ)ᵀ M (w − ŵ)` at fixed codes.

    A 3×3 solve per row.
    A row whose error the solve would not lower in float32 (codes that are all equal, say) keeps what it came with.

    Args:
      w: weights of one group, a row an output.
      codes: digits.
      scales: those so far.
      metric: M, as `e2m_atq.relocate` takes it; None for the weights' own.
      mask: which columns exist.
    """
    ones = jnp.broadcast_to(mask.astype(w.dtype), codes.shape)
    basis = jnp.stack([*split(codes), ones], axis=1)  # [n, 3, g]
    in_metric = basis if metric is None else jnp.einsum("nig,gh->nih", basis, metric, precision=_HIGHEST)
    gram = jnp.einsum("nih,njh->nij", in_metric, basis, precision=_HIGHEST)
    target = jnp.einsum("nih,nh->ni", in_metric, w * ones, precision=_HIGHEST)
    # Scaled to a unit diagonal, so that one ridge makes every system solvable.
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(gram, axis1=1, axis2=2), 1e-30))
    solved = _solve(gram / (size[:, :, None] * size[:, None, :]), target / size) / size
    old = jnp.stack(scales, axis=1)

    def excess(p):  # the error less its constant term wᵀMw
        return (jnp.einsum("nij,nj->ni", gram, p, precision=_HIGHEST) * p).sum(-1) - 2 * (target * p).sum(-1)

    better = excess(solved) < excess(old)
    alpha, residual_alpha, mu = jnp.where(better[:, None], solved, old).T
    return alpha, residual_alpha, mu


def _solve(gram: Float[Array, "n 3 3"], target: Float[Array, "n 3"]) -> Float[Array, "n 3"]:
    """Return `(G + 1e-5·I)⁻¹ t`, `[n, 3]`, of unit diagonals, written out.

    A library's solver takes a launch for each of its steps.
    """
    d = 1 + 1e-5
    a, b, c = gram[:, 0, 1], gram[:, 0, 2], gram[:, 1, 2]
    adjugate = (
        (d * d - c * c, b * c - a * d, a * c - b * d),
        (d * d - b * b, a * b - c * d),
        (d * d - a * a,),
    )
    (c00, c01, c02), (c11, c12), (c22,) = adjugate
    determinant = jnp.maximum(d * c00 + a * c01 + b * c02, 1e-10)
    x, y, z = target.T
    solved = (c00 * x + c01 * y + c02 * z, c01 * x + c11 * y + c12 * z, c02 * x + c12 * y + c22 * z)
    return jnp.stack(solved, axis=1) / determinant[:, None]
