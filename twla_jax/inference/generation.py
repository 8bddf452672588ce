"""Generates text with a key/value cache."""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from twla_jax.inference.request import Request, checked_request
from twla_jax.inference.sampling import Sampler, Sampling, add_seen, choose, require_tokens
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache

_BUCKET = (
    64  # prompts and outputs are rounded up to a power of two times this, so that few shapes are compiled
)
_CHUNK = 512  # tokens of a prompt at a time
# Of a long prompt, more at a time: weights and earlier keys are read less often. Its rest goes in by smaller chunks.
_LONG_CHUNK, _LONG_PROMPT = 2048, 8192
_SHORT_PROMPT = 16


def generate(
    model: Decoder,
    prompt: Int[np.ndarray, "b t"],
    *,
    max_new_tokens: int,
    cache_dtype: Any = None,
    **settings: Any,
) -> Int32[np.ndarray, "b new"]:
    """Return all tokens of `stream` at once, `[b, t]`: at most `max_new_tokens` a row, fewer where every row ended.

    The whole of it runs on the device, without a word to the host between tokens. Arguments and errors are those of
    `stream`: among them `sampling=Sampling(temperature=0.7, top_p=0.9)`.

    Raises:
      TwlaError: as `stream`.
    """
    request = checked_request(model, prompt, max_new_tokens, **settings)
    cache = _new_cache(request, cache_dtype)
    if _recomputes_at(request) is not None:  # which needs the host
        return np.stack([token for token, _ in advance(request, cache, cache_dtype=cache_dtype)], axis=1)
    token, seen, cache = fill(request, cache, held=0)
    tokens, made, _ = steps(
        *(request.model, token, cache, jnp.int32(request.count), request.sampler, request.key, request.ends),
        seen=seen,
        room=bucket(request.count),
    )
    found = np.asarray(tokens[:, : int(made)])
    require_tokens(found, model.dtype)
    return found


def stream(
    model: Decoder,
    prompt: Int[np.ndarray, "b t"],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    temperature: float | None = None,
    key: jax.Array | None = None,
    eos_token_ids: Collection[int] | None = None,
    cache_dtype: Any = None,
) -> Iterator[Int32[np.ndarray, " b"]]:
    """Continue `prompt` token by token; yields the next token of every row as soon as it is there.

    Args:
      model: quantised or not, packed or not.
      prompt: token ids, rows of equal length.
      max_new_tokens: the most tokens that are added.
      sampling: how tokens are chosen; the likeliest ones if None.
      temperature: short for `sampling=Sampling(temperature=…)`.
      key: random key for sampling; made of the seed in `sampling` if None.
      eos_token_ids: ids that end a row (`model.config.eos_token_ids` if None; empty for none). A row that has ended
        repeats its last token; the stream ends when all have.
      cache_dtype: of the keys and values: the model's if None; int8, with a scale for every token and head, takes half
        of bf16's bytes.

    Raises:
      TwlaError: (at the call) the prompt is empty or outside the vocabulary, a setting is out of range, or prompt and
        new tokens together exceed `max_position_embeddings`. Later: the model's logits are not finite.
    """
    request = checked_request(
        model,
        prompt,
        max_new_tokens,
        sampling=sampling,
        temperature=temperature,
        key=key,
        eos_token_ids=eos_token_ids,
    )
    steps = advance(request, _new_cache(request, cache_dtype), cache_dtype=cache_dtype)
    return (token for token, _ in steps)


def _new_cache(request: Request, dtype: Any) -> KVCache:
    batch, length = request.prompt.shape
    return request.model.init_cache(batch, cache_size(room_for(length, 0, request.count)), dtype)


def room_for(length: int, held: int, count: int) -> int:
    """Return the positions that `fill` and `count` new tokens need.

    Args:
      length: of the prompt.
      held: tokens of it that the cache has already.
      count: new tokens.
    """
    chunk = _chunk(length - held)
    return max(held + -(-(length - held) // chunk) * chunk, length + count)


def _chunk(length: int) -> int:
    # A CPU takes as long for tokens that only fill up as for others.
    short = length <= _SHORT_PROMPT and jax.default_backend() == "cpu"
    return min(_CHUNK, bucket(length), _SHORT_PROMPT if short else _CHUNK)


def fill(
    request: Request, cache: KVCache, *, held: int, made: int = 0
) -> tuple[jax.Array, jax.Array | None, KVCache]:
    """Return the first new token, the tokens seen with it, and the cache with the prompt in it.

    The prompt goes in by chunks of one length, which is compiled once; a long one by chunks of two.

    Args:
      request: what is to be generated.
      cache: of at least `room_for` positions; it is donated.
      held: tokens of the prompt that the cache has already, fewer than all.
      made: tokens of the prompt that were generated, by which random numbers go on.
    """
    length = request.prompt.shape[1]
    chunk, key = _chunk(length - held), jax.random.fold_in(request.key, made)
    padded = np.pad(request.prompt, ((0, 0), (0, chunk)))
    cache, token = dataclasses.replace(cache, length=jnp.int32(held)), None
    start, long = held, length - held >= _LONG_PROMPT
    while start < length:
        size = _LONG_CHUNK if long and length - start >= _LONG_CHUNK else chunk
        part, count = padded[:, start : start + size], jnp.int32(min(size, length - start))
        token, cache = _prefill(
            request.model, part, count, cache, jnp.int32(length), request.sampler, request.seen, key
        )
        start += size
    assert token is not None  # not all of the prompt is held
    return token, add_seen(None if request.seen is None else jnp.asarray(request.seen), token), cache


def advance(
    request: Request, cache: KVCache, *, held: int = 0, cache_dtype: Any = None
) -> Iterator[tuple[Int32[np.ndarray, " b"], KVCache]]:
    """Yield the next token of every row, with a cache of all before it, until every row has ended.

    The next step takes the cache's memory. Where LongRoPE changes its factors, the keys of all tokens so far are
    computed anew with the new ones, as transformers does.

    Args:
      request: what is to be generated.
      cache: of at least `room_for` positions; it is donated.
      held: as `fill` takes it.
      cache_dtype: as `stream` takes it.

    Raises:
      TwlaError: logits are not finite.
    """
    token, seen, cache = fill(request, cache, held=held)
    ended, changes = np.zeros(len(request.prompt), bool), _recomputes_at(request)
    text = [request.prompt]
    for made in range(1, request.count + 1):
        current = np.asarray(token)
        require_tokens(current, request.model.dtype)
        yield current, cache
        ended |= np.isin(current, request.ends)
        if ended.all() or made == request.count:
            return
        text.append(current[:, None])
        if request.prompt.shape[1] + made == changes:
            del cache  # before there is another
            whole = request._replace(
                prompt=np.concatenate(text, axis=1), count=request.count - made, seen=seen
            )
            following, seen, cache = fill(whole, _new_cache(whole, cache_dtype), held=0, made=made)
        else:
            key = jax.random.fold_in(request.key, made)
            following, seen, cache = step(request.model, token, cache, request.sampler, key, seen)
        token = jnp.where(ended, token, following)


def _recomputes_at(request: Request) -> int | None:
    """Return the length at which all tokens are computed anew, if that lies within what is to be generated."""
    scaling, length = request.model.config.rope_scaling, request.prompt.shape[1]
    if scaling is None or scaling.kind != "longrope":
        return None
    changes = int(scaling.original_max_position_embeddings) + 1  # the first length of the long factors
    return changes if length < changes < length + request.count else None


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="room")
def steps(
    model: Decoder,
    token: Int32[Array, " b"],
    cache: KVCache,
    count: Int32[Array, ""],
    sampler: Sampler,
    key,
    ends: Int32[Array, " ends"],
    *,
    seen: Bool[Array, "b vocab"] | None = None,
    room: int,
) -> tuple[Int32[Array, "b room"], Int32[Array, ""], KVCache]:
    """Return the tokens of `advance` after a known first one, in `room` columns, how many there are, and the cache.

    It ends at logits that are not finite, whose token is −1. The cache is returned for the sake of the donated one, in
    which it lives.
    """

    def unfinished(state):
        made, token, ended, _, _, _ = state
        return (made < count) & ~ended.all() & (token >= 0).all()

    def following(state):
        made, token, ended, seen, cache, tokens = state
        chosen, seen, cache = step(model, token, cache, sampler, jax.random.fold_in(key, made), seen)
        token = jnp.where(ended, token, chosen)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, made))
        return made + 1, token, ended | jnp.isin(token, ends), seen, cache, tokens

    tokens = jnp.zeros((len(token), room), jnp.int32).at[:, 0].set(token)
    start = (jnp.int32(1), token, jnp.isin(token, ends), seen, cache, tokens)
    made, _, _, _, cache, tokens = jax.lax.while_loop(unfinished, following, start)
    return tokens, made, cache


@functools.partial(jax.jit, donate_argnames="cache")
def _prefill(
    model: Decoder,
    chunk: Int32[Array, "b t"],
    count: Int32[Array, ""],
    cache: KVCache,
    until: Int32[Array, ""],
    sampler: Sampler,
    seen: Bool[Array, "b vocab"] | None,
    key,
) -> tuple[Int32[Array, " b"], KVCache]:
    """Write the next `count` tokens of a prompt, padded on the right, into the cache; return the token that follows.

    What the filling left in the cache lies past its `length` and is overwritten before it is read.
    """
    h, filled = model.decode(chunk, cache, until=until)
    last = jax.lax.dynamic_index_in_dim(h, count - 1, axis=1, keepdims=False)
    cache = dataclasses.replace(filled, length=cache.length + count)
    return choose(model.logits(last), sampler, seen, key), cache


@functools.partial(jax.jit, donate_argnames="cache")
def step(
    model: Decoder,
    token: Int32[Array, " b"],
    cache: KVCache,
    sampler: Sampler,
    key,
    seen: Bool[Array, "b vocab"] | None = None,
) -> tuple[Int32[Array, " b"], Bool[Array, "b vocab"] | None, KVCache]:
    """Return the token after `token` in every row, the tokens seen with it, and the cache with `token` in it."""
    h, cache = model.decode(token[:, None], cache)
    following = choose(model.logits(h[:, 0]), sampler, seen, key)
    return following, add_seen(seen, following), cache


def cache_size(length: int) -> int:
    """Return the positions of a cache: at most a quarter more than `length`, or 64, as each step reads them all."""
    step = max(_BUCKET, bucket(length) // 8)
    return -(-length // step) * step


def bucket(length: int) -> int:
    """Return `length` rounded up to a power of two times 64, so that few lengths are compiled."""
    size = _BUCKET
    while size < length:
        size *= 2
    return size
