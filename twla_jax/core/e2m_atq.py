"""Fits ternary codes and their scales by E2M-ATQ, the asymmetric ternary quantiser.

A weight row is cut into groups of columns; each group is represented as `Ŵ = α·T + μ` with `T ∈ {-1, 0, 1}` (TWLA,
arXiv 2606.13054, section 3: Euclidean fit, then relocation on the manifold of the layer's outputs).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_HIGHEST = jax.lax.Precision.HIGHEST


def euclidean_fit(
    w: Float[Array, "n g"], mask: Bool[Array, " g"], *, steps: int = 15, threshold: float = 0.75
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, "n g"]]:
    """Fit `α·T + μ` to each row of one group in the weights' own metric: stage 1 of E2M-ATQ.

    `Δ = threshold·mean|w − μ|`, `T = sign(w − μ)·[|w − μ| > Δ]`, `α = ⟨T, w − μ⟩ / ΣT²`; then `μ ← μ + mean(w − Ŵ)`,
    `steps` times.

    Args:
      w: weights of one group, a row an output.
      mask: which columns exist; a short last group is padded to the group size.
      steps: corrections of μ.
      threshold: of the dead zone.
    Returns:
      `(alpha, mu, codes)`, `[n]`, `[n]` and `[n, g]`, codes as floats in {-1, 0, 1}, 0 where masked out.
    """
    count = mask.sum()

    def mean(v):
        return jnp.where(mask, v, 0).sum(-1) / count

    def assign(mu):
        centred = jnp.where(mask, w - mu[:, None], 0)
        delta = threshold * mean(jnp.abs(centred))
        codes = jnp.sign(centred) * (jnp.abs(centred) > delta[:, None])
        alpha = (codes * centred).sum(-1) / jnp.maximum(jnp.abs(codes).sum(-1), 1)
        return alpha, codes

    def step(_, mu):
        alpha, codes = assign(mu)
        return mu + mean(w - alpha[:, None] * codes - mu[:, None])

    mu = jax.lax.fori_loop(0, steps, step, mean(w))
    alpha, codes = assign(mu)
    return alpha, mu, codes


def relocate(
    w: Float[Array, "n g"],
    codes: Float[Array, "n g"],
    alpha: Float[Array, " n"],
    mu: Float[Array, " n"],
    metric: Float[Array, "g g"],
    mask: Bool[Array, " g"],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Move (α, μ), `[n]` each, to the least output error at fixed T: stage 2 of E2M-ATQ.

    The error is `(w − αt − μ1)ᵀ M (w − αt − μ1)`.

    One 2×2 solve per row, the fixed point of the published coordinate steps. A row whose system is singular (all
    codes equal), or whose error the solve would not lower in float32, keeps the (α, μ) it came with.

    Args:
      w: weights of one group, a row an output.
      codes: T, as floats in {-1, 0, 1}.
      alpha: α so far.
      mu: μ so far.
      metric: M, second moments of the group's inputs, or their Schur complement (see `gptq`); symmetric, positive
        semidefinite.
      mask: which columns exist.
    """
    ones = mask.astype(w.dtype)
    w = w * ones
    metric_codes = jnp.matmul(codes, metric, precision=_HIGHEST)
    metric_ones = jnp.matmul(metric, ones, precision=_HIGHEST)
    tt = (metric_codes * codes).sum(-1)
    t1 = metric_codes @ ones
    oo = ones @ metric_ones
    tw = (metric_codes * w).sum(-1)
    ow = (w * metric_ones).sum(-1)
    determinant = tt * oo - t1 * t1
    regular = determinant > 1e-6 * tt * oo
    safe = jnp.where(regular, determinant, 1)
    new_alpha = jnp.where(regular, (oo * tw - t1 * ow) / safe, alpha)
    new_mu = jnp.where(regular, (tt * ow - t1 * tw) / safe, mu)

    def excess(a, m):  # the error less its constant term wᵀMw
        return a * a * tt + m * m * oo + 2 * a * m * t1 - 2 * a * tw - 2 * m * ow

    better = excess(new_alpha, new_mu) <= excess(alpha, mu)
    return jnp.where(better, new_alpha, alpha), jnp.where(better, new_mu, mu)


def symmetric_fit(
    w: Float[Array, "n g"], mask: Bool[Array, " g"], *, threshold: float = 0.75
) -> tuple[Float[Array, " n"], Float[Array, "n g"]]:
    """Fit `α·T` to each row of one group in the weights' own metric: one step of stage 1 with μ = 0.

    Args:
      w: weights of one group, a row an output.
      mask: which columns exist.
      threshold: of the dead zone, `Δ = threshold·mean|w|`.
    Returns:
      `(alpha, codes)`, `[n]` and `[n, g]`, codes as floats in {-1, 0, 1}, 0 where masked out.
    """
    w = jnp.where(mask, w, 0)
    delta = threshold * jnp.abs(w).sum(-1) / mask.sum()
    codes = jnp.sign(w) * (jnp.abs(w) > delta[:, None])
    return (codes * w).sum(-1) / jnp.maximum(jnp.abs(codes).sum(-1), 1), codes


def relocate_symmetric(
    w: Float[Array, "n g"],
    codes: Float[Array, "n g"],
    alpha: Float[Array, " n"],
    metric: Float[Array, "g g"],
    mask: Bool[Array, " g"],
) -> Float[Array, " n"]:
    """Return the α, `[n]`, of the least output error at fixed T with μ = 0: `tᵀMw / tᵀMt`.

    A row without codes, or whose best α would not be positive, keeps its own.

    Args:
      w: weights of one group, a row an output.
      codes: T, as floats in {-1, 0, 1}.
      alpha: α so far.
      metric: M, as for `relocate`.
      mask: which columns exist.
    """
    metric_codes = jnp.matmul(codes, metric, precision=_HIGHEST)
    tt = (metric_codes * codes).sum(-1)
    tw = (metric_codes * jnp.where(mask, w, 0)).sum(-1)
    return jnp.where((tt > 0) & (tw > 0), tw / jnp.where(tt > 0, tt, 1), alpha)


def nearest_codes(
    w: Float[Array, "*shape"], alpha: Float[Array, "*#shape"], mu: Float[Array, "*#shape"] | float = 0.0
) -> Float[Array, "*shape"]:
    """Return the code in {-1, 0, 1} whose value `α·T + μ` lies nearest to w, in its shape; α = 0 gives 0."""
    ratio = (w - mu) / jnp.where(alpha == 0, jnp.inf, alpha)
    return jnp.clip(jnp.round(ratio), -1, 1)
