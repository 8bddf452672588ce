"""Computes the loss of refinement: how far a student's predictions are from its teacher's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twla_jax.models.decoder import Decoder

_LOSS_CHUNK = 256  # positions whose logits exist at the same time, per window


def kl_of_hidden(
    student: Decoder,
    teacher: Decoder,
    got: Float[Array, "b t d"],
    expected: Float[Array, "b t d"],
    size: int,
) -> Float[Array, ""]:
    """Return the divergence `Σ p (log p − log q)` of both models' logits, over all positions and divided by `size`.

    Args:
      student: its head gives q.
      teacher: its head gives p.
      got: the student's hidden states, after its final norm.
      expected: the teacher's, through which no gradient passes.
      size: usually the number of positions, for a mean.
    """
    length = got.shape[1]
    expected = jax.lax.stop_gradient(expected)
    chunk = min(_LOSS_CHUNK, length)
    padding = -length % chunk

    def chunks(h):
        h = jnp.pad(h, ((0, 0), (0, padding), (0, 0)))
        return h.reshape(h.shape[0], -1, chunk, h.shape[-1]).swapaxes(0, 1)

    real = jnp.arange(length + padding).reshape(-1, chunk) < length

    def chunk_kl(p, q, real):
        """Return the divergence of a chunk and its slope at q: `softmax(q) − softmax(p)` at the student's logits."""
        logits, uncapped = jax.vjp(student.cap_logits, student.head_outputs(q))
        expected, got = jax.nn.log_softmax(teacher.logits(p)), jax.nn.log_softmax(logits)
        likely = jnp.exp(expected)
        divergence = jnp.where(real, (likely * (expected - got)).sum(-1), 0).sum() / size
        (slope,) = uncapped(jnp.where(real[:, None], jnp.exp(got) - likely, 0) / size)
        return divergence, student.head_slope(slope.astype(q.dtype))

    # A chunk's gradient is taken while its logits are there: neither model's are computed again for the way back.
    got = chunks(got)
    fixed = jax.lax.stop_gradient(got)
    loss, slope = jax.lax.map(lambda chunk: chunk_kl(*chunk), (chunks(expected), fixed, real))
    return loss.sum() + (slope * (got - fixed)).sum().astype(loss.dtype)
