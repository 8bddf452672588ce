"""Defines the optimiser of refinement and its learning rates."""

import functools
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import DTypeLike

from twla_jax.core import stiefel
from twla_jax.refinement_settings import LearningSettings

_ADAM_RMS = 0.2  # of its updates at rate 1, as they usually are
_MUON_DECAY = 0.95  # of its momentum
_WARMUP = 0.1  # share of the steps over which learning rates rise; a good start is lost without


def rates_at(settings: LearningSettings, step: int, steps: int) -> dict[str, float]:
    """Return the learning rates of one step: up in a line, level, then down to zero as a cosine.

    They fall over the last `settings.cooldown · steps` steps; with 1, from the end of the rise on. Rates are data, so
    that one program takes all.
    """
    warmup = math.ceil(_WARMUP * steps)
    start = max(warmup, steps - math.ceil(settings.cooldown * steps))
    falling = math.cos(math.pi * max(step - start, 0) / max(steps - start, 1))
    share = min((step + 1) / warmup, (1 + falling) / 2)
    return {name: share * peak for name, peak in settings.peak_rates.items()}


def optimizer(
    rates: dict[str, Any], learns_rotations: bool, *, narrow: bool = False, dtype: DTypeLike = "float32"
) -> optax.GradientTransformation:
    """Return Adam with a rate for codes, for scales and norms, for clips, and for rotations, on the manifold.

    With a rate for `muon` instead of `codes`, the codes' latents of a matrix are moved by Muon (Jordan, 2024;
    arXiv 2502.16982): the momentum, made orthogonal by five products in `dtype`. If `narrow`, Adam's first moment of
    codes is bfloat16 and its second one factored into rows and columns; Muon's one moment is bfloat16.
    """

    def labels(latents):
        return {name: {part: kinds.get(part, "scales") for part in parts} for name, parts in latents.items()}

    kinds = {
        "u": "muon" if "muon" in rates else "codes",
        "left": "rotations",
        "right": "rotations",
        "clip": "clips",
    }
    adam: dict[Hashable, optax.GradientTransformation] = {
        name: optax.adam(rate, b2=0.95) for name, rate in rates.items()
    }
    if "muon" in rates:
        adam["muon"] = optax.chain(
            optax.trace(
                _MUON_DECAY, nesterov=True, accumulator_dtype=jnp.bfloat16 if narrow else jnp.float32
            ),
            optax.stateless(functools.partial(_orthogonal, dtype=dtype)),
            optax.stateless(_like_adam),
            optax.scale_by_learning_rate(rates["muon"]),
        )
    elif narrow:
        adam["codes"] = optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.95, decay_rate_fn=_mean_at_first),
            optax.ema(0.9, accumulator_dtype=jnp.bfloat16),
            optax.scale_by_learning_rate(rates["codes"]),
        )
    if "rotations" in adam:
        adam["rotations"] = stiefel.riemannian(adam["rotations"]) if learns_rotations else optax.set_to_zero()
    return optax.partition(adam, labels)


def _orthogonal(momentum: Any, _: Any, *, dtype: DTypeLike) -> Any:
    """Return matrices made nearly orthogonal by Newton and Schulz's iteration in `dtype`, in their own dtypes."""
    alone = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=_matrices)
    given = jax.tree.map(lambda leaf: leaf.astype(dtype), momentum)
    updates, _ = alone.update(given, alone.init(given))
    return jax.tree.map(lambda update, leaf: update.astype(leaf.dtype), updates, momentum)


def _matrices(latents: Any) -> Any:
    """Return which axes of each latent are a matrix's: the last two."""
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    return jax.tree.map(lambda _: numbers, latents)


def _like_adam(updates: Any, _: Any) -> Any:
    """Return orthogonal updates with the root mean square that Adam's have, so that rates mean the same."""
    return jax.tree.map(lambda u: u * (_ADAM_RMS * max(u.shape[-2:]) ** 0.5), updates)


def _mean_at_first(step: Any, decay: Any) -> jnp.ndarray:
    """Return the decay that takes the mean over the first steps, as Adam's correction of its start does."""
    return jnp.minimum(decay, 1 - 1 / (step + 1))
