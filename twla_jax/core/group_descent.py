"""Lowers the output error of a swept matrix, a group of columns at a time, all others as they are.

The sweep decides each column once, before it knows what later columns will be rounded to. Afterwards all are known:
with the others fixed, the best code of one column, and the best scales of one group, lower `(w − ŵ) H (w − ŵ)ᵀ` or
leave it (coordinate descent, as in QuantEase, arXiv 2309.01885, with scales that move, too).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from twla_jax.core.quantizers import Quantizer, Scales

_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 128  # columns decided between two products


def descend(
    target: Float[Array, "n padded"],
    codes: Float[Array, "n padded"],
    scales: tuple[Float[Array, "groups n"], ...],
    moment: Float[Array, "padded padded"],
    ridge: Float[Array, ""],
    exists: Bool[Array, " padded"],
    levels: Quantizer,
    passes: int,
) -> tuple[Float[Array, "n padded"], tuple[Float[Array, "groups n"], ...]]:
    """Return codes `[n, padded]` and scales `[groups, n]` after so many passes over all groups.

    Args:
      target: W, rows are outputs.
      codes: of the sweep, as floats.
      scales: of the sweep, as stored.
      moment: S/t; `H = S/t + ridge·I`.
      ridge: what damps it.
      exists: which columns do.
      levels: what is rounded to.
      passes: over all groups; static.
    """
    groups = scales[0].shape[0]
    group = target.shape[1] // groups

    def descend_group(state, index):
        codes, scales, slope = state
        start = index * group
        columns = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=group)
        mask, rows = columns(exists), columns(moment)
        metric = columns(rows, axis=1) + jnp.diag(jnp.where(mask, ridge, 1))
        here, own = columns(codes, axis=1), tuple(each[index] for each in scales)
        before = _values(here, own, mask, levels)
        here = _descend_columns(columns(slope, axis=1), here, own, metric, mask, levels)
        # The best the group could be with the others as they are: the least of a parabola in its own columns.
        inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(metric), True), jnp.eye(group))
        best = before + jnp.matmul(columns(slope, axis=1), inverse, precision=_HIGHEST)
        here, own = levels.stored(here, levels.relocate(best, here, own, metric, mask))
        change = _values(here, own, mask, levels) - before
        slope = slope - jnp.matmul(change, rows, precision=_HIGHEST)
        damped = columns(slope, axis=1) - ridge * change
        slope = jax.lax.dynamic_update_slice_in_dim(slope, damped, start, 1)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, here, start, 1)
        return (codes, tuple(a.at[index].set(b) for a, b in zip(scales, own, strict=True)), slope), None

    by_group = codes.reshape(len(codes), groups, group)
    values = levels.values(by_group, *(each.T[..., None] for each in scales)).reshape(codes.shape)
    difference = target - jnp.where(exists, values, 0)
    slope = jnp.matmul(difference, moment, precision=_HIGHEST) + ridge * difference
    order = jnp.tile(jnp.arange(groups), passes)
    (codes, scales, _), _ = jax.lax.scan(descend_group, (codes, scales, slope), order)
    return codes, scales


def _values(
    codes: Float[Array, "n g"], scales: Scales, mask: Bool[Array, " g"], levels: Quantizer
) -> Float[Array, "n g"]:
    return jnp.where(mask, levels.values(codes, *(each[:, None] for each in scales)), 0)


def _descend_columns(
    slope: Float[Array, "n g"],
    codes: Float[Array, "n g"],
    scales: Scales,
    metric: Float[Array, "g g"],
    mask: Bool[Array, " g"],
    levels: Quantizer,
) -> Float[Array, "n g"]:
    """Return the codes `[n, g]` of one group after each column's was chosen anew, one after another.

    Args:
      slope: `(w − ŵ) H` at the group's columns.
      codes: so far.
      scales: of the group.
      metric: H at the group's rows and columns.
      mask: which columns exist.
      levels: what is rounded to.
    """
    size = codes.shape[1]
    block = math.gcd(size, _BLOCK)
    values = _values(codes, scales, mask, levels)

    def column(j, state):
        codes, values, slope, square = state
        code = levels.nearest(values[j] + slope[j] / square[j, j], *scales)
        change = levels.values(code, *scales) - values[j]
        return (
            codes.at[j].set(code),
            values.at[j].add(change),
            slope - square[j][:, None] * change,
            square,
        )

    def descend_block(index, state):
        codes, values, slope = state  # columns first: a column is then a contiguous slice
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=index * block, slice_size=block)
        rows = part(metric)
        before = part(values)
        new, after, _, _ = jax.lax.fori_loop(
            0, block, column, (part(codes), before, part(slope), part(rows, axis=1))
        )
        slope = slope - jnp.matmul(rows.T, after - before, precision=_HIGHEST)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * block, axis=0)
        return put(codes, new), put(values, after), slope

    codes, _, _ = jax.lax.fori_loop(0, size // block, descend_block, (codes.T, values.T, slope.T))
    return jnp.where(mask, codes.T, 0)
