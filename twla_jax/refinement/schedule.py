"""Defines the optimiser of refinement and its learning rates."""

import math
from collections.abc import Hashable
from typing import Any

import jax.numpy as jnp
import optax

from twla_jax.core import stiefel
from twla_jax.recipe import LearningSettings

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
    rates: dict[str, Any], learns_rotations: bool, *, narrow: bool = False
) -> optax.GradientTransformation:
    """Return Adam with a rate for codes, for scales and norms, for clips, and for rotations, on the manifold.

    If `narrow`, codes have a first moment in bfloat16 and a second one that is factored into rows and columns.
    """

    def labels(latents):
        return {name: {part: kinds.get(part, "scales") for part in parts} for name, parts in latents.items()}

    kinds = {"u": "codes", "left": "rotations", "right": "rotations", "clip": "clips"}
    adam: dict[Hashable, optax.GradientTransformation] = {
        name: optax.adam(rate, b2=0.95) for name, rate in rates.items()
    }
    if narrow:
        adam["codes"] = optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.95, decay_rate_fn=_mean_at_first),
            optax.ema(0.9, accumulator_dtype=jnp.bfloat16),
            optax.scale_by_learning_rate(rates["codes"]),
        )
    if "rotations" in adam:
        adam["rotations"] = stiefel.riemannian(adam["rotations"]) if learns_rotations else optax.set_to_zero()
    return optax.partition(adam, labels)


def _mean_at_first(step: Any, decay: Any) -> jnp.ndarray:
    """Return the decay that takes the mean over the first steps, as Adam's correction of its start does."""
    return jnp.minimum(decay, 1 - 1 / (step + 1))
