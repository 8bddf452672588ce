"""Text generation with a key/value cache."""

import dataclasses
import functools
import operator
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from twla_jax.errors import TwlaError
from twla_jax.limits import check_number
from twla_jax.models.arguments import checked_tokens, require_model
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache

_BUCKET = (
    64  # prompts and outputs are rounded up to a power of two times this, so that few shapes are compiled
)
_CHUNK = 512  # tokens of a prompt at a time


def generate(
    model: Decoder, prompt: Int[np.ndarray, "b t"], *, max_new_tokens: int, **settings
) -> Int32[np.ndarray, "b new"]:
    """Return all tokens of `stream` at once, `[b, t]`: at most `max_new_tokens` a row, fewer where every row ended.

    The whole of it runs on the device, without a word to the host between tokens.
    """
    model, prompt, count, temperature, key, ends, cache_dtype = _checked(
        prompt, model, max_new_tokens, **settings
    )
    token, cache = _start(model, prompt, count, temperature, key, cache_dtype)
    tokens, made, _ = steps(model, token, cache, jnp.int32(count), temperature, key, ends, room=bucket(count))
    return np.asarray(tokens[:, : int(made)])


def stream(
    model: Decoder,
    prompt: Int[np.ndarray, "b t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    eos_token_ids: Collection[int] | None = None,
    cache_dtype: Any = None,
) -> Iterator[Int32[np.ndarray, " b"]]:
    """Continue `prompt` token by token; yields the next token of every row as soon as it is there.

    Args:
      model: quantised or not, packed or not.
      prompt: token ids, rows of equal length.
      max_new_tokens: the most tokens that are added.
      temperature: 0 takes the likeliest token; else samples from `softmax(logits / temperature)`.
      key: random key for sampling; `jax.random.key(0)` if None.
      eos_token_ids: ids that end a row (`model.config.eos_token_ids` if None; empty for none). A row that has ended
        repeats its last token; the stream ends when all have.
      cache_dtype: of the keys and values: the model's if None; int8, with a scale for every token and head, takes half
        of bf16's bytes.

    Raises:
      TwlaError: (at the call) the prompt is empty or outside the vocabulary, a setting is out of range, or prompt and
        new tokens together exceed `max_position_embeddings`.
    """
    return _stream(*_checked(prompt, model, max_new_tokens, temperature, key, eos_token_ids, cache_dtype))


def _checked(
    prompt, model, max_new_tokens, temperature=0.0, key=None, eos_token_ids=None, cache_dtype=None
) -> tuple:
    """Return the arguments of `stream` as arrays, if they are usable."""
    require_model(model)
    prompt = checked_tokens(prompt, model.config, "prompt", fits=False)
    length = prompt.shape[1]
    check_number("max_new_tokens", max_new_tokens)
    check_number("temperature", temperature)
    if (total := length + max_new_tokens) > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise TwlaError(
            f"max_new_tokens {max_new_tokens}: with {length} prompt tokens {total}, above the model's {limit}"
        )
    ends = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
    key = jax.random.key(0) if key is None else key
    model = jax.tree.map(jnp.asarray, model)  # once, not at every step
    try:
        ends = np.asarray([operator.index(each) for each in ends], np.int32)
    except (TypeError, OverflowError):
        raise TwlaError(f"eos_token_ids {ends!r}: must be token ids") from None
    return model, prompt, max_new_tokens, jnp.float32(temperature), key, ends, cache_dtype


def _start(model, prompt, max_new_tokens, temperature, key, cache_dtype) -> tuple[jax.Array, KVCache]:
    """Return the first new token and the cache; the prompt goes in by chunks of one length, compiled once."""
    batch, length = prompt.shape
    chunk = min(_CHUNK, bucket(length))
    padded = np.pad(prompt, ((0, 0), (0, -length % chunk)))
    cache = model.init_cache(batch, cache_size(max(padded.shape[1], length + max_new_tokens)), cache_dtype)
    key = jax.random.fold_in(key, 0)
    for start in range(0, length, chunk):
        part, count = padded[:, start : start + chunk], jnp.int32(min(chunk, length - start))
        token, cache = _prefill(model, part, count, cache, temperature, key)
    return token, cache


def _stream(model, prompt, max_new_tokens, temperature, key, ends, cache_dtype) -> Iterator[np.ndarray]:
    token, cache = _start(model, prompt, max_new_tokens, temperature, key, cache_dtype)
    ended = np.zeros(len(prompt), bool)
    for step in range(1, max_new_tokens + 1):
        current = np.asarray(token)
        yield current
        ended |= np.isin(current, ends)
        if ended.all() or step == max_new_tokens:
            return
        following, cache = _step(model, token, cache, temperature, jax.random.fold_in(key, step))
        token = jnp.where(ended, token, following)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="room")
def steps(
    model: Decoder,
    token: Int32[Array, " b"],
    cache: KVCache,
    count: Int32[Array, ""],
    temperature,
    key,
    ends: Int32[Array, " ends"],
    *,
    room: int,
) -> tuple[Int32[Array, "b room"], Int32[Array, ""], KVCache]:
    """Return the tokens of `_stream` after a known first one, in `room` columns, how many there are, and the cache.

    The cache is returned for the sake of the donated one, in which it lives.
    """

    def unfinished(state):
        made, _, ended, _, _ = state
        return (made < count) & ~ended.all()

    def step(state):
        made, token, ended, cache, tokens = state
        following, cache = _step(model, token, cache, temperature, jax.random.fold_in(key, made))
        token = jnp.where(ended, token, following)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, made))
        return made + 1, token, ended | jnp.isin(token, ends), cache, tokens

    tokens = jnp.zeros((len(token), room), jnp.int32).at[:, 0].set(token)
    start = (jnp.int32(1), token, jnp.isin(token, ends), cache, tokens)
    made, _, _, cache, tokens = jax.lax.while_loop(unfinished, step, start)
    return tokens, made, cache


@functools.partial(jax.jit, donate_argnames="cache")
def _prefill(
    model: Decoder, chunk: Int32[Array, "b t"], count: Int32[Array, ""], cache: KVCache, temperature, key
) -> tuple[Int32[Array, " b"], KVCache]:
    """Write the next `count` tokens of a prompt, padded on the right, into the cache; return the token that follows.

    What the filling left in the cache lies past its `length` and is overwritten before it is read.
    """
    h, filled = model.decode(chunk, cache)
    last = jax.lax.dynamic_index_in_dim(h, count - 1, axis=1, keepdims=False)
    cache = dataclasses.replace(filled, length=cache.length + count)
    return _sample(model.logits(last), temperature, key), cache


@functools.partial(jax.jit, donate_argnames="cache")
def _step(
    model: Decoder, token: Int32[Array, " b"], cache: KVCache, temperature, key
) -> tuple[Int32[Array, " b"], KVCache]:
    h, cache = model.decode(token[:, None], cache)
    return _sample(model.logits(h[:, 0]), temperature, key), cache


def _sample(logits: Float[Array, "b vocab"], temperature: Float[Array, ""], key) -> Int32[Array, " b"]:
    sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, sampled, logits.argmax(-1)).astype(jnp.int32)


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


def stream_text(
    model: Decoder,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    cache_dtype: Any = None,
) -> Iterator[tuple[int, str]]:
    """Continue a prompt; yields each new token with the text it adds, which is empty inside a character.

    Args:
      model: quantised or not, packed or not.
      tokenizer: the model's.
      prompt: text to continue.
      max_new_tokens: the most tokens that are added.
      temperature: 0 takes the most likely token, 1 samples from the model's own distribution.
      seed: of the sampling.
      cache_dtype: as `generation.stream` takes it.

    Raises:
      TwlaError: what `generate.stream` refuses.
    """
    check_number("seed", seed)
    ids = list(tokenizer(prompt)["input_ids"])
    shown = len(tokenizer.decode(ids, skip_special_tokens=True))
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "key": jax.random.key(seed)}
    for step in stream(model, np.asarray([ids], np.int32), cache_dtype=cache_dtype, **settings):
        ids.append(int(step[0]))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        piece = "" if text.endswith("\ufffd") else text[shown:]
        shown += len(piece)
        yield ids[-1], piece


def sample_texts(
    model: Decoder,
    tokenizer: Any,
    prompt: str,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    cache_dtype: Any = None,
) -> tuple[list[str], list[list[int]]]:
    """Return several continuations of a prompt, made side by side: their texts and tokens, each up to where it ended.

    Raises:
      TwlaError: what `generation.stream` refuses, or fewer than one sample.
    """
    check_number("samples", samples)
    check_number("seed", seed)
    ids = np.asarray(tokenizer(prompt)["input_ids"], np.int32)
    tokens = generate(
        model,
        np.tile(ids, (samples, 1)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        key=jax.random.key(seed),
        cache_dtype=cache_dtype,
    )
    rows = []
    for row in tokens.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in model.config.eos_token_ids), len(row))
        rows.append(row[:end])
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows], rows
