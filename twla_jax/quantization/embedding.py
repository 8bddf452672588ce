"""Stores the embedding and the LM head as integers: most bytes of a small model once its linears are ternary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twla_jax.core.quantizers import Integers
from twla_jax.core.tensors import IntegerTensor
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.recipe import EmbeddingSettings


def quantize_embeddings(model: Decoder, settings: EmbeddingSettings) -> Decoder:
    """Return the same model with its embedding, and its LM head where it has one of its own, rounded to nearest.

    Rows are tokens, in groups of columns with a range of least error each. The new arrays lie on the host.
    """

    def quantized(rows: Float[Array | np.ndarray, "vocab d"]) -> IntegerTensor:
        return jax.tree.map(np.asarray, _quantize(rows, settings=settings))

    changes = {"embed": quantized(model.embed.get_value())}
    if model.head is not None:
        changes["head.kernel"] = quantized(model.head.kernel.get_value().T)
    return replace(model, changes)


@functools.partial(jax.jit, static_argnames="settings")
def _quantize(rows: Float[Array, "vocab d"], *, settings: EmbeddingSettings) -> IntegerTensor:
    columns = rows.shape[1]
    group = settings.group_size or columns
    groups = -(-columns // group)
    levels = Integers(bits=settings.bits)
    padded = jnp.pad(jnp.asarray(rows, jnp.float32), ((0, 0), (0, groups * group - columns)))
    exists = jnp.arange(groups * group) < columns

    def fit(part):
        scales, codes = levels.fit(*part)
        return codes, scales

    by_group = padded.reshape(len(rows), groups, group).swapaxes(0, 1), exists.reshape(groups, group)
    codes, scales = jax.lax.map(fit, by_group)
    codes = codes.swapaxes(0, 1).reshape(len(rows), -1)[:, :columns]
    return levels.pack(codes, tuple(scale.T for scale in scales), group)
