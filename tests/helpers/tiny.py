"""How the tests quantise the small model of `tiny_config`: all in one way, so that it is compiled once for all."""

import jax
import numpy as np

from twla_jax.core.settings import ActivationSettings, RotationSettings, TernarySettings, WeightSettings
from twla_jax.recipe import Recipe

RECIPE = Recipe(
    name="tiny",
    weights=WeightSettings(quantizer=TernarySettings(euclidean_steps=5, rounds=1), group_size=16),
    rotation=RotationSettings(steps=5),
    activations=ActivationSettings(clips=(1.0, 0.8), clip_tokens=64),
)
WINDOWS = np.random.default_rng(0).integers(0, 97, (12, 24)).astype(np.int32)


@jax.jit
def logits(model, tokens):
    """Return a model's logits, `[b, s, vocabulary]`, compiled."""
    return model(tokens)


def assert_same(one, other):
    """Assert that two models have the same structure and the same numbers."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
