"""Measures how far one model's predictions are from another's: both run over the same windows in one pass."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from twla_jax.evaluation.nll import sum_predictions
from twla_jax.models.decoder import Decoder


@functools.partial(jax.jit, static_argnames="chunk")
def window_divergence(
    model: Decoder, original: Decoder, windows: Int32[Array, "b t"], *, chunk: int = 512
) -> dict[str, Float[Array, " b"]]:
    """Return of each window the means over its `t − 1` predictions, float32.

    With p the original's and q the model's distribution of the next token, these are

    - `nll`: `−log q` of the token that follows;
    - `original_nll`: `−log p` of that token;
    - `kl`: the divergence `Σ_v p_v (log p_v − log q_v)`, in nats;
    - `agreement`: whether the likeliest token of both is the same, as a share.

    Args:
      model: the model that is judged.
      original: the one it is compared with, of the same vocabulary.
      windows: tokens, each window from its own beginning.
      chunk: positions whose logits exist at the same time; `[b, t, vocab]` never exists whole.
    """
    return hidden_divergence(
        model, original, (model.hidden(windows), original.hidden(windows)), windows, chunk=chunk
    )


def hidden_divergence(
    model: Decoder,
    original: Decoder,
    hidden: tuple[Float[Array, "b t d"], Float[Array, "b t d"]],
    windows: Int32[Array, "b t"],
    *,
    chunk: int,
) -> dict[str, Float[Array, " b"]]:
    """Return `window_divergence` from what `hidden(windows)` of the two models gives."""

    def compare(hidden, targets):
        q, p = (jax.nn.log_softmax(each.logits(h)) for each, h in zip((model, original), hidden, strict=True))
        nll, original_nll = (
            -jnp.take_along_axis(each, targets[..., None], axis=-1)[..., 0] for each in (q, p)
        )
        return {
            "nll": nll,
            "original_nll": original_nll,
            "kl": (jnp.exp(p) * (p - q)).sum(-1),
            "agreement": (q.argmax(-1) == p.argmax(-1)).astype(jnp.float32),
        }

    sums = sum_predictions(compare, hidden, windows, chunk=chunk)
    return {name: value / (windows.shape[1] - 1) for name, value in sums.items()}
