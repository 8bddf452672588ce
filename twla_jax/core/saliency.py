"""Finds the published layout's four groups: salient columns, and two magnitude groups inside and outside them.

The public TWLA code (arXiv 2606.13054, GitHub `Kishon-zzx/TWLA`) splits every 128 columns of a rotated weight before
it fits a scale. All splits are searched on the saliency `A = W² / d²`, not on W. Here every search evaluates its
candidates as one batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from twla_jax.core import masked_fit
from twla_jax.core.grouped_tensor import MAX_SALIENT

_QUANTILES = 81  # candidates for a threshold, from the 0.10 to the 0.90 quantile
_HIGHEST = jax.lax.Precision.HIGHEST
_BATCH = 9  # candidates evaluated at a time, which bounds the memory they take


def saliency(w: Float[Array, "n g"], diagonal: Float[Array, " g"]) -> Float[Array, "n g"]:
    """Return `A = W² / d²`, `[n, g]`, where d is the diagonal of the upper Cholesky factor of `H⁻¹`."""
    return jnp.square(w) / jnp.square(diagonal)


def group_masks(
    w: Float[Array, "n g"],
    diagonal: Float[Array, " g"],
    moment: Float[Array, "g g"],
    mask: Bool[Array, " g"],
) -> Bool[Array, "4 n g"]:
    """Return the four groups of a block as masks that partition its existing columns.

    In this order: salient and large, salient and small, other and large, other and small.

    Args:
      w: weights of the block, as compensated so far.
      diagonal: of the upper Cholesky factor of `H⁻¹`, at these columns.
      moment: second moments of the block's inputs; only their ratios matter.
      mask: which columns exist; a short last block is padded.
    """
    a = jnp.where(mask, saliency(w, diagonal), 0)
    salient = salient_columns(a, mask)
    inside = jnp.broadcast_to(mask & salient, a.shape)
    outside = jnp.broadcast_to(mask & ~salient, a.shape)
    large_inside = a >= salient_threshold(a, inside)
    large_outside = a >= other_threshold(a, inside, outside, moment)
    return jnp.stack(
        [inside & large_inside, inside & ~large_inside, outside & large_outside, outside & ~large_outside]
    )


def salient_columns(a: Float[Array, "n g"], mask: Bool[Array, " g"]) -> Bool[Array, " g"]:
    """Return which columns are salient, `[g]`: of 1 to 63 columns of the largest sums, the count of least error.

    Salient and other columns are each approximated by two greedy ternary terms a row; the error is the mean square.
    """
    order = jnp.argsort(jnp.where(mask, -jnp.abs(a).sum(0), jnp.inf))
    rank = jnp.argsort(order)

    def error(count):
        chosen = jnp.broadcast_to(mask & (rank < count), a.shape)
        rest = jnp.broadcast_to(mask & (rank >= count), a.shape)
        approximation = masked_fit.greedy(a, chosen, terms=2) + masked_fit.greedy(a, rest, terms=2)
        return jnp.where(count < mask.sum(), jnp.square(a - approximation).sum(), jnp.inf)

    counts = jnp.arange(1, MAX_SALIENT + 1)
    return mask & (rank < counts[_errors(error, counts).argmin()])


def salient_threshold(a: Float[Array, "n g"], inside: Bool[Array, "n g"]) -> Float[Array, ""]:
    """Return the saliency from which an element of a salient column is large.

    Of 81 quantiles of the non-zero values there, the one of least mean square error when the elements at or above it
    and those below it are each approximated by two greedy ternary terms a row.
    """

    def error(threshold):
        large, small = inside & (a >= threshold), inside & (a < threshold)
        approximation = masked_fit.greedy(a, large, terms=2) + masked_fit.greedy(a, small, terms=2)
        return jnp.square(jnp.where(inside, a - approximation, 0)).sum()

    candidates = _quantiles(a, inside & (a != 0))
    return candidates[_errors(error, candidates).argmin()]


def other_threshold(
    a: Float[Array, "n g"],
    inside: Bool[Array, "n g"],
    outside: Bool[Array, "n g"],
    moment: Float[Array, "g g"],
) -> Float[Array, ""]:
    """Return the saliency from which an element outside the salient columns is large.

    Of 81 quantiles (zeros in the place of salient columns included), the one of least `⟨(A − Â)ᵀ(A − Â), S⟩` when
    large and small elements are each approximated by one ternary term a row, and salient columns by two planes.
    """
    existing = jnp.broadcast_to((inside | outside).any(0), a.shape)
    scales, codes = masked_fit.euclidean_two_planes(a, inside)
    salient = masked_fit.values(scales, codes, inside)

    def error(threshold):
        large, small = outside & (a >= threshold), outside & (a < threshold)
        approximation = masked_fit.greedy(a, large, terms=1) + masked_fit.greedy(a, small, terms=1)
        rest = jnp.where(existing, a - approximation - salient, 0)
        return (jnp.matmul(rest, moment, precision=_HIGHEST) * rest).sum()

    candidates = _quantiles(jnp.where(outside, a, 0), existing)
    return candidates[_errors(error, candidates).argmin()]


def _errors(error: Callable, candidates: Array) -> Float[Array, " candidates"]:
    return jax.lax.map(error, candidates, batch_size=_BATCH)


def _quantiles(values: Float[Array, "n g"], chosen: Bool[Array, "n g"]) -> Float[Array, " quantiles"]:
    """Return the 0.10 to 0.90 quantiles of the chosen values, interpolated linearly as numpy does."""
    ordered = jnp.sort(jnp.where(chosen, jnp.abs(values), jnp.inf).ravel())
    last = jnp.maximum(chosen.sum() - 1, 0)
    place = jnp.linspace(0.10, 0.90, _QUANTILES) * last
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, last)]
    return jnp.where(chosen.any(), low + (high - low) * (place - below), 0)
