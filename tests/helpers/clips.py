"""Sets the clips of a model's activation quantisers."""

import dataclasses

import jax
import jax.numpy as jnp

from twla_jax.core.activation import ActivationQuantizer
from twla_jax.models.decoder import Decoder


def with_clips(model: Decoder, clip: float) -> Decoder:
    """Return the model with every clip, at all bits, at `clip`."""

    def replaced(leaf):
        is_quantizer = isinstance(leaf, ActivationQuantizer)
        return dataclasses.replace(leaf, clips=jnp.full_like(leaf.clips, clip)) if is_quantizer else leaf

    return jax.tree.map(replaced, model, is_leaf=lambda leaf: isinstance(leaf, ActivationQuantizer))
