"""Computes log-likelihoods of continuations, which multiple-choice tasks compare."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from twla_jax.devices import on_device
from twla_jax.errors import TwlaError
from twla_jax.inference.sampling import NOT_FINITE
from twla_jax.models.arguments import checked_tokens, require_model
from twla_jax.models.decoder import Decoder
from twla_jax.progress import Bar

Pair = tuple[Sequence[int], Sequence[int]]

_SHORTEST = 64  # lengths are rounded up to this times a power of two, so that few shapes are compiled
_FEW = 32  # predictions of a short continuation, which are scored apart from long ones
_LOGIT_ROWS = 512  # positions whose logits exist at the same time


def continuation_loglikelihoods(
    model: Decoder,
    pairs: Sequence[Pair],
    *,
    max_length: int | None = None,
    batch_tokens: int = 2048,
    progress: bool = False,
) -> list[tuple[float, bool]]:
    """Return of each pair `log p(continuation | context)` and whether the continuation is the greedy one.

    Args:
      model: quantised or not, packed or not.
      pairs: token ids of a context and of its continuation; neither is empty.
      max_length: tokens that the model reads at most, of a longer pair the last; by default as many as it can.
      batch_tokens: tokens at a time, rows times their padded length.
      progress: a bar on stderr.

    Raises:
      TwlaError: a context or a continuation is empty, or one of these is too long or outside the vocabulary; or the
        model's predictions are not finite, of which a task would make an answer.
    """
    require_model(model)
    limit = max_length or model.config.max_position_embeddings
    cut = [_cut(context, continuation, limit) for context, continuation in pairs]
    if cut:
        checked_tokens(np.concatenate([tokens for tokens, _ in cut]), model.config, "pairs", ranks=(1,))
    model = on_device(model)  # once, not at every batch
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (tokens, count) in enumerate(cut):
        length = _padded(len(tokens) - 1)
        groups.setdefault((length, _FEW if count <= _FEW else length), []).append(index)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(cut)
    with Bar(total=len(cut), desc="score", unit="text", disable=not progress) as bar:
        # The longest first: if memory is short, that shows at once.
        for (length, count), members in sorted(groups.items(), reverse=True):
            rows = max(1, batch_tokens // length)
            for start in range(0, len(members), rows):
                batch = members[start : start + rows]
                # A short last batch is filled up, so that nothing compiles twice.
                tokens, first, counts = np.zeros((rows, length + 1), np.int32), *np.zeros((2, rows), np.int32)
                for row, index in enumerate(batch):
                    ids, counts[row] = cut[index]
                    tokens[row, : len(ids)] = ids
                    first[row] = len(ids) - 1 - counts[row]
                sums, greedy = map(np.asarray, _score(model, tokens, first, counts, count=count))
                if not np.isfinite(sums[: len(batch)]).all():
                    raise TwlaError(f"{NOT_FINITE}, so there is no likelihood; compute in another dtype")
                for row, index in enumerate(batch):
                    found[index] = float(sums[row]), bool(greedy[row])
                bar.update(len(batch))
    return found


def rolling_pairs(tokens: Sequence[int], prefix: int, max_length: int) -> Iterator[Pair]:
    """Yield pairs that predict each token of a text once, from as much context as the model reads.

    Args:
      tokens: the text.
      prefix: what the first token is predicted from.
      max_length: tokens that the model reads at a time.
    """
    tokens = list(tokens)
    for start in range(0, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        context = tokens[max(0, end - max_length - 1) : start] if start else [prefix]
        yield context, tokens[start:end]


def _cut(context: Sequence[int], continuation: Sequence[int], limit: int) -> tuple[np.ndarray, int]:
    """Return the last tokens of a pair that a model reads and predicts, and how many are predicted."""
    if not len(context) or not len(continuation):
        raise TwlaError("a context and its continuation need at least one token each")
    if len(continuation) > limit:
        raise TwlaError(f"a continuation has {len(continuation)} tokens, and the model reads {limit}")
    return np.asarray([*context, *continuation][-limit - 1 :]), len(continuation)


def _padded(length: int) -> int:
    size = _SHORTEST
    while size < length:
        size *= 2
    return size


@functools.partial(jax.jit, static_argnames="count")
def _score(
    model: Decoder,
    tokens: Int32[Array, "b t1"],
    first: Int32[Array, " b"],
    counts: Int32[Array, " b"],
    *,
    count: int,
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """Return the summed log-probabilities of `counts` predictions from position `first` on, and if all are greedy."""
    hidden = model.hidden(tokens[:, :-1])
    wanted = jnp.arange(count) < counts[:, None]
    at = jnp.minimum(first[:, None] + jnp.arange(count), hidden.shape[1] - 1)
    h = jnp.take_along_axis(hidden, at[..., None], axis=1).reshape(-1, hidden.shape[-1])
    targets = jnp.take_along_axis(tokens, at + 1, axis=1).reshape(-1)
    rows = min(_LOGIT_ROWS, len(h))
    padding = -len(h) % rows
    h, targets = jnp.pad(h, ((0, padding), (0, 0))), jnp.pad(targets, (0, padding))

    def part(operands):
        h, targets = operands
        logits = model.logits(h)
        of_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return of_target - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == targets

    parts = h.reshape(-1, rows, h.shape[-1]), targets.reshape(-1, rows)
    logs, greedy = jax.tree.map(
        lambda each: each.reshape(-1)[: wanted.size].reshape(wanted.shape), jax.lax.map(part, parts)
    )
    return jnp.where(wanted, logs, 0).sum(-1), (greedy | ~wanted).all(-1)
