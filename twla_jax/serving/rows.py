"""Says what the device holds of every running request beside its keys and values, and draws its next token."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from twla_jax.inference.sampling import Sampler, Sampling, choose, likeliest
from twla_jax.models.config import DecoderConfig

_MOST_ENDS = 8  # token ids that end a request, where the model has not more of them
_OF_A_CHAT = 4  # that a chat template may add to the model's
MOST_TOP = 20  # likeliest tokens that are told beside the chosen one
_NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Holds what the device knows of the requests in some slots, beside their keys and values.

    Attributes:
      token: the last token, which the next step reads.
      made: new tokens so far.
      limit: new tokens at most.
      active: whether the request goes on.
      seed: of its random numbers.
      ends: tokens that end it; −1 where there are fewer.
      sampler: its settings, an entry a slot.
      told: whether log-probabilities are wanted.
    """

    token: Int32[Array, " slots"]
    made: Int32[Array, " slots"]
    limit: Int32[Array, " slots"]
    active: Bool[Array, " slots"]
    seed: Int32[Array, " slots"]
    ends: Int32[Array, "slots ends"]
    sampler: Sampler
    told: Bool[Array, " slots"]


class Told(NamedTuple):
    """Log-probabilities before temperature and filters: of the chosen tokens, and of the likeliest ones."""

    chosen: Float32[Array, "*rows"]
    top_tokens: Int32[Array, "*rows top"]
    top: Float32[Array, "*rows top"]


class Made(NamedTuple):
    """New tokens of some slots: the first `counts` of each row, and what is told of them, if anything.

    A token of −1 is the last of its row: its logits were not finite.
    """

    tokens: Int32[Array, "rows steps"]
    counts: Int32[Array, " rows"]
    told: Told | None


def most_ends(config: DecoderConfig) -> int:
    """Return how many token ids may end a request: all of the model's, and those of a chat."""
    return max(_MOST_ENDS, len(config.eos_token_ids) + _OF_A_CHAT)


def row(sampling: Sampling, *, limit: int, ends: Sequence[int], told: bool, config: DecoderConfig) -> Rows:
    """Return the row of a request that has no token yet, on the host."""
    padded = [*ends, *[_NO_TOKEN] * (most_ends(config) - len(ends))]

    def one(value: Any, kind: Any) -> Any:
        return np.asarray([value], kind)

    sampler = Sampler(
        temperature=one(sampling.temperature, np.float32),
        top_k=one(sampling.top_k or config.vocab_size, np.int32),
        top_p=one(sampling.top_p, np.float32),
        min_p=one(sampling.min_p, np.float32),
    )
    return Rows(
        token=one(0, np.int32),
        made=one(0, np.int32),
        limit=one(limit, np.int32),
        active=one(False, bool),
        seed=one(sampling.seed, np.int32),
        ends=one(padded, np.int32),
        sampler=sampler,
        told=one(told, bool),
    )


def next_tokens(logits: Float32[Array, "rows vocab"], rows: Rows) -> tuple[Int32[Array, " rows"], Told]:
    """Return the next token of every row, as `sampling.choose` gives it to that row alone, and what is told of it.

    What no request asks for is not computed: random numbers, the sorting that filters need, log-probabilities. One
    branch for all of it, as for each a GPU waits for the host.
    """
    sampler: Any = rows.sampler  # every setting is there
    drawn = rows.active & (sampler.temperature > 0)
    vocab = logits.shape[-1]
    filtered = drawn & ((sampler.top_k < vocab) | (sampler.top_p < 1) | (sampler.min_p > 0))
    told = (rows.active & rows.told).any()
    top = min(MOST_TOP, vocab)

    def nothing(token):
        return token, Told(*(jnp.zeros((len(token), *shape), kind) for shape, kind in told_forms(top)))

    kind = jnp.where(told, 3, jnp.where(filtered.any(), 2, drawn.any().astype(jnp.int32)))
    return jax.lax.switch(
        kind,
        [
            lambda: nothing(likeliest(logits)),
            lambda: nothing(drawn_tokens(logits, rows, filtered=False)),
            lambda: nothing(drawn_tokens(logits, rows, filtered=True)),
            lambda: told_tokens(logits, rows),
        ],
    )


def told_tokens(logits: Float32[Array, "rows vocab"], rows: Rows) -> tuple[Int32[Array, " rows"], Told]:
    """Return what `next_tokens` does, with everything computed for every row, so that nothing branches."""
    of_all = jax.nn.log_softmax(logits.astype(jnp.float32))
    token = _each(logits, rows, rows.sampler)
    likeliest, tokens = jax.lax.top_k(of_all, min(MOST_TOP, logits.shape[-1]))
    chosen = jnp.take_along_axis(of_all, token[:, None], axis=1)[:, 0]
    return token, Told(chosen, tokens.astype(jnp.int32), likeliest)


def drawn_tokens(
    logits: Float32[Array, "rows vocab"], rows: Rows, *, filtered: bool
) -> Int32[Array, " rows"]:
    """Return the tokens of `next_tokens`, drawn and likeliest ones; nothing branches.

    Args:
      logits: of each row.
      rows: the requests.
      filtered: whether any has filters; then all rows are sorted.
    """
    sampler = rows.sampler if filtered else Sampler(temperature=rows.sampler.temperature)
    return _each(logits, rows, sampler)


def _each(logits: Float32[Array, "rows vocab"], rows: Rows, sampler: Sampler) -> Int32[Array, " rows"]:
    """Return the token that `choose` gives to each row, with that row's settings and random numbers."""
    keys = jax.vmap(lambda seed, made: jax.random.fold_in(jax.random.key(seed), made))(rows.seed, rows.made)
    one = jax.vmap(lambda row, settings, key: choose(row[None], settings, None, key)[0])
    return one(logits, sampler, keys)


def told_forms(top: int) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Return the shape of what is told of a token, and its dtype, in the order of `Told`."""
    return ((), jnp.float32), ((top,), jnp.int32), ((top,), jnp.float32)


def together(rows: Sequence[Rows]) -> Rows:
    """Return the rows of several requests, on the host, as one."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)


def advanced(rows: Rows, token: Int32[Array, " rows"]) -> Rows:
    """Return the rows after a new token; those that were not active stay as they are."""
    failed = rows.active & (token < 0)
    token = jnp.where(rows.active & ~failed, token, rows.token)
    made = rows.made + rows.active
    ended = (token[:, None] == rows.ends).any(-1) | (made >= rows.limit) | failed
    return dataclasses.replace(rows, token=token, made=made, active=rows.active & ~ended)
