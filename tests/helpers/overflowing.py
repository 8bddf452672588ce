"""Makes a model whose values overflow at one token, as those of some models do in float16."""

import dataclasses

import numpy as np
from flax import nnx

from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace


def overflowing(model, token):
    """Return a tied model with an infinite embedding of `token`, and a head of its own, which stays finite."""
    untied = Decoder(dataclasses.replace(model.config, tie_word_embeddings=False), rngs=nnx.Rngs(0))
    untied.head.kernel = nnx.Param(np.array(model.embed.get_value()).T.copy())
    table = np.array(model.embed.get_value())
    table[token] = np.inf
    return replace(untied, embed=nnx.Param(table), blocks=model.blocks, norm=model.norm)
