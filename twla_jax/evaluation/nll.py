"""Computes the negative log-likelihood of windows, without all of their logits at the same time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from twla_jax.models.decoder import Decoder


@functools.partial(jax.jit, static_argnames="chunk")
def window_nll(model: Decoder, windows: Int32[Array, "b t"], *, chunk: int = 512) -> Float[Array, " b"]:
    """Return the mean negative log-likelihood of each window's `t − 1` predictions, float32."""
    return hidden_nll(model, model.hidden(windows), windows, chunk=chunk)


def hidden_nll(
    model: Decoder, hidden: Float[Array, "b t d"], windows: Int32[Array, "b t"], *, chunk: int
) -> Float[Array, " b"]:
    """Return `window_nll` from what `model.hidden(windows)` gives, the logits of `chunk` positions at a time."""

    def nll(h, targets):
        logits = model.logits(h)
        of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - of_target

    return sum_predictions(nll, hidden, windows, chunk=chunk) / (windows.shape[1] - 1)


def sum_predictions(
    score: Callable[[Any, Int32[Array, "b c"]], Any],
    hidden: Any,
    windows: Int32[Array, "b t"],
    *,
    chunk: int,
) -> Any:
    """Return `[b]` for every array of `score`'s result: its sum over the `t − 1` predictions of each window.

    Args:
      score: takes hidden states of `chunk` positions and the tokens that follow them; returns arrays `[b, chunk]`.
      hidden: what it takes, for all positions: `[b, t, d]`, or a tuple of these.
      windows: the tokens at these positions.
      chunk: positions at a time.
    """
    length = windows.shape[1] - 1
    padding = -length % chunk
    hidden = jax.tree.map(lambda h: jnp.pad(h[:, :-1], ((0, 0), (0, padding), (0, 0))), hidden)
    targets = jnp.pad(windows[:, 1:], ((0, 0), (0, padding)))
    real = jnp.arange(length + padding) < length

    def chunk_sum(start):
        h, t = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk, axis=1), (hidden, targets)
        )
        here = jax.lax.dynamic_slice_in_dim(real, start, chunk)
        return jax.tree.map(lambda a: jnp.where(here, a, 0).sum(-1), score(h, t))

    sums = jax.lax.map(chunk_sum, jnp.arange(0, length + padding, chunk))
    return jax.tree.map(lambda a: a.sum(0), sums)
