"""Sweeps the columns of a matrix so that later columns make up for the errors of earlier ones (GPTQ).

Notation: `H = S/t + λI` is the damped mean second moment of the inputs. With `H = R Rᵀ`, R upper triangular, and `U
= R⁻¹`, an error e on columns b is made up for by adding `−e R_bb U_b,rest` to the columns that follow (GPTQ, arXiv
2210.17323, written blockwise), and what remains of it costs `e (R_bb R_bbᵀ) eᵀ`: the Schur complement of H over the
later columns.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from twla_jax.core import group_descent, tensors
from twla_jax.core.factors import Factors, factor_groups, group_and_padded, mean_diagonal, padded_moment
from twla_jax.core.quantizers import PackedTensor, Quantizer, quantizer
from twla_jax.core.settings import CompensationSettings, WeightSettings

_DEFAULT = WeightSettings()
_HIGHEST = jax.lax.Precision.HIGHEST
_BLOCK = 128  # columns swept between two updates of the rest
_STRIP = 4  # of these between two updates of the block: a GPU takes as long to begin a step as to run it


def accumulate_moment(moment: Float[Array, "m m"], x: Float[Array, "*tokens m"]) -> Float[Array, "m m"]:
    """Return `S + XᵀX`, float32 `[m, m]`, in true float32 whatever the dtype of x.

    Args:
      moment: S, the sum so far; zeros to begin with.
      x: inputs of a linear, any leading axes.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return moment + jnp.matmul(rows.T, rows, precision=_HIGHEST)


@functools.partial(jax.jit, static_argnames="settings")
def quantize_matrix(
    weight: Float[Array, "n m"],
    moment: Float[Array, "m m"],
    tokens: Num[Array, ""] | float,
    error_moment: Float[Array, "m m"] | None = None,
    *,
    settings: WeightSettings = _DEFAULT,
) -> tuple[PackedTensor, dict[str, Float[Array, ""]]]:
    """Quantise a matrix `[n, m]`, group by group of columns in one scan; return the packed tensor and its errors.

    Per group: a fit (E2M-ATQ, where one plane is asked for) on the weights as compensated so far; `rounds` times a
    sweep that re-rounds the codes column by column and a relocation of the scales for the new codes; then the group's
    remaining error is pushed to the groups that follow. Scales are rounded before that, so what is stored is what is
    compensated.

    Args:
      weight: rows are outputs, already rotated.
      moment: `S = Σ xᵀx` over calibration inputs, rotated the same way.
      tokens: how many tokens S sums over.
      error_moment: H_δ of QEP, `Σ (x₀ − x)ᵀx`, x₀ what the full-precision model has in place of x, rotated the same
        way: what is quantised is then `propagated` weights. The errors stay those of `weight` itself.
      settings: the quantiser, its groups and the error compensation; static.
    Returns:
      The packed tensor, and scalars: `output_error` (`‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²`), `weight_error`, and `damping`, the
      fraction of the mean diagonal that made H factor (NaN errors mean that none did).
    """
    mean_moment = moment / tokens
    drift = None if error_moment is None else output_drift(weight, error_moment / tokens, None, settings)
    return sweep_columns(weight, mean_moment, factor_groups(mean_moment, settings), drift, settings)


def output_drift(
    weight: Float[Array, "n m"],
    mean_error_moment: Float[Array, "m m"],
    mean_lack: Float[Array, "n m"] | None,
    settings: WeightSettings,
) -> Float[Array, "n padded"]:
    """Return `β·W H_δ + γ·L`, what outputs lack of the full-precision model's, against the inputs; see `propagated`.

    Args:
      weight: W, rows are outputs.
      mean_error_moment: H_δ, a token.
      mean_lack: L, what the residual stream that the outputs are added to lacks before them, against the inputs, a
        token; None leaves it out.
      settings: the shares β and γ of its compensation are read, and its groups.
    """
    _, m = weight.shape
    more = (0, group_and_padded(m, settings)[1] - m)
    weight = jnp.pad(weight.astype(jnp.float32), ((0, 0), more))
    shares = settings.compensation or CompensationSettings(propagation=0)
    drift = jnp.matmul(weight, jnp.pad(mean_error_moment, more), precision=_HIGHEST) * shares.propagation
    return drift if mean_lack is None else drift + shares.stream * jnp.pad(mean_lack, ((0, 0), more))


def sweep_columns(
    weight: Float[Array, "n m"],
    mean_moment: Float[Array, "m m"],
    factors: Factors,
    drift: Float[Array, "n padded"] | None,
    settings: WeightSettings,
) -> tuple[PackedTensor, dict[str, Float[Array, ""]]]:
    """Return what `quantize_matrix` does, from what it takes of the moments.

    Args:
      weight: rows are outputs, already rotated.
      mean_moment: `S/t`.
      factors: of `S/t`, by `factor_groups`.
      drift: by `output_drift`, where propagated errors are made up for.
      settings: the quantiser, its groups and the error compensation.
    """
    n, m = weight.shape
    group, padded = group_and_padded(m, settings)
    weight = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, padded - m)))
    exists = jnp.arange(padded) < m
    inverse, roots, damping = factors
    levels = quantizer(settings)
    by_group = padded_moment(mean_moment, padded, settings) if levels.metric == "group" else None
    target = weight if drift is None else _made_up(weight, drift, inverse)

    def quantize_group(w, group_at):
        start, root_group = group_at
        columns = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=group)
        w_group, mask = columns(w, axis=1), columns(exists)
        inverse_rows = columns(inverse)
        if by_group is None:
            metric = jnp.matmul(root_group, root_group.T, precision=_HIGHEST)
        else:
            metric = columns(columns(by_group), axis=1)
        scales, codes = levels.fit(w_group, mask)
        scales = levels.relocate(w_group, codes, scales, metric, mask)
        for _ in range(levels.rounds):
            codes = sweep_codes(w_group, scales, columns(inverse_rows, axis=1), mask, levels)
            scales = levels.relocate(w_group, codes, scales, metric, mask)
        codes, scales = levels.stored(codes, scales)
        error = jnp.where(mask, w_group - levels.values(codes, *(p[:, None] for p in scales)), 0)
        pushed = jnp.matmul(
            jnp.matmul(error, root_group, precision=_HIGHEST), inverse_rows, precision=_HIGHEST
        )
        w = w - jnp.where(jnp.arange(padded) >= start + group, pushed, 0)
        return w, (scales, codes.astype(jnp.int16))

    _, (scales, codes) = jax.lax.scan(quantize_group, target, (jnp.arange(0, padded, group), roots))
    codes = codes.transpose(1, 0, 2).reshape(n, padded)
    if settings.compensation and settings.compensation.passes:
        whole, ridge = padded_moment(mean_moment, padded, settings), damping * mean_diagonal(mean_moment)
        codes, scales = group_descent.descend(
            target,
            codes.astype(jnp.float32),
            scales,
            whole,
            ridge,
            exists,
            levels,
            settings.compensation.passes,
        )
    tensor = levels.pack(codes[:, :m], tuple(p.T for p in scales), group)
    difference = weight[:, :m] - tensors.dequantize(tensor)
    return tensor, output_figures(weight[:, :m], difference, mean_moment) | {"damping": damping}


def propagated(
    weight: Float[Array, "n m"],
    error_moment: Float[Array, "m m"],
    inverse: Float[Array, "m m"],
    share: Float[Array, ""] | float,
) -> Float[Array, "n m"]:
    """Return `W* = W + β·W H_δ H⁻¹`, `[n, m]`, as QEP has it (arXiv 2504.09629).

    With β = 1 it minimises `‖W X₀ − W* X‖² / t + λ‖W* − W‖²`: the weights that come nearest to the full-precision
    outputs on the inputs X that the quantised prefix gives.

    Args:
      weight: W, rows are outputs.
      error_moment: `H_δ = (X₀ − X) Xᵀ / t`.
      inverse: U, with `H⁻¹ = UᵀU`.
      share: β; errors are made up for where the calibration text has them, at β = 1 fully.
    """
    return _made_up(weight, share * jnp.matmul(weight, error_moment, precision=_HIGHEST), inverse)


def _made_up(
    weight: Float[Array, "n m"],
    drift: Float[Array, "n m"],
    inverse: Float[Array, "m m"],
) -> Float[Array, "n m"]:
    """Return `W + D H⁻¹`, of the drift D."""
    change = jnp.matmul(drift, inverse.T, precision=_HIGHEST)
    return weight + jnp.matmul(change, inverse, precision=_HIGHEST)


def sweep_codes(
    w: Float[Array, "n g"],
    scales: tuple[Float[Array, " n"], ...],
    inverse: Float[Array, "g g"],
    mask: Bool[Array, " g"],
    levels: Quantizer,
) -> Float[Array, "n g"]:
    """Return the codes `[n, g]` of one group at fixed scales, column by column, as floats.

    The error of each column is pushed to the later columns of the group (GPTQ, arXiv 2210.17323).

    Args:
      w: the group's weights, as compensated for the groups before.
      scales: of the quantiser, one value a row each.
      inverse: `U_bb`, the group's diagonal block of the upper triangular factor of `H⁻¹ = UᵀU`.
      mask: which columns exist; the codes of others are 0.
      levels: what is rounded to.
    """
    size = w.shape[1]
    block = math.gcd(size, _BLOCK)
    strip = math.gcd(block, _STRIP)

    def sweep_strip(s, state):
        w_block, codes, errors, u = state
        start = s * strip
        rows = jax.lax.dynamic_slice_in_dim(u, start, strip)
        inside = jax.lax.dynamic_slice_in_dim(rows, start, strip, axis=1)
        mine = jax.lax.dynamic_slice_in_dim(w_block, start, strip)
        found, missed = [], []
        for j in range(strip):
            current = mine[j]
            for i, error in enumerate(missed):
                current = current - inside[i, j] * error
            found.append(levels.nearest(current, *scales))
            error = (current - levels.values(found[j], *scales)) / inside[j, j]
            missed.append(jax.lax.optimization_barrier(error))  # else XLA computes it again in each use
        later = jnp.arange(block) >= start + strip
        for i, error in enumerate(missed):
            w_block = w_block - jnp.where(later, rows[i], 0)[:, None] * error
        codes, errors = (
            jax.lax.dynamic_update_slice_in_dim(all_, jnp.stack(new), start, 0)
            for all_, new in ((codes, found), (errors, missed))
        )
        return w_block, codes, errors, u

    def sweep_block(b, state):
        w, codes = state  # columns first: a column is then a contiguous slice
        start = b * block
        rows = jax.lax.dynamic_slice_in_dim(inverse, start, block)
        u = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        w_block = jax.lax.dynamic_slice_in_dim(w, start, block)
        empty = jnp.zeros_like(w_block)
        steps = block // strip
        _, new, errors, _ = jax.lax.fori_loop(0, steps, sweep_strip, (w_block, empty, empty, u))
        if size > block:
            later = jnp.arange(size) >= start + block
            w = w - jnp.matmul(jnp.where(later, rows, 0).T, errors, precision=_HIGHEST)
        return w, jax.lax.dynamic_update_slice_in_dim(codes, new, start, 0)

    _, codes = jax.lax.fori_loop(0, size // block, sweep_block, (w.T, jnp.zeros_like(w.T)))
    return jnp.where(mask, codes.T, 0)


def output_figures(
    weight: Float[Array, "n m"], difference: Float[Array, "n m"], moment: Float[Array, "m m"]
) -> dict[str, Float[Array, ""]]:
    """Return `output_error` (`‖X D ᵀ‖² / ‖X Wᵀ‖²`) and `weight_error` (`‖D‖² / ‖W‖²`) of a difference D."""

    def energy(v):
        return (jnp.matmul(v, moment, precision=_HIGHEST) * v).sum()

    return {
        "output_error": energy(difference) / jnp.maximum(energy(weight), 1e-30),
        "weight_error": jnp.square(difference).sum() / jnp.maximum(jnp.square(weight).sum(), 1e-30),
    }
