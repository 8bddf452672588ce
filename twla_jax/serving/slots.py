"""Keeps slots in one cache: what the device holds of every running request, and the programs that change it.

A request is prefilled in a cache of its own row, by chunks of few lengths, and then copied into a slot. One decode step
takes the first `rows` slots along, each at its own position, with its own settings and random numbers; slots that are
free or finished are computed, too, at position 0, and ignored. So nothing that a request does changes a shape.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from twla_jax.inference.packed_cache import KernelScratch, PackedCache
from twla_jax.inference.sampling import Sampler, Sampling, choose, likeliest
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Holds the cache of all slots, each with its own length, and their rows."""

    cache: KVCache
    rows: Rows


class Told(NamedTuple):
    """Log-probabilities before temperature and filters: of the chosen tokens, and of the likeliest ones."""

    chosen: Float32[Array, "*rows"]
    top_tokens: Int32[Array, "*rows top"]
    top: Float32[Array, "*rows top"]


class Made(NamedTuple):
    """New tokens of some slots: the first `counts` of each row, and what is told of them.

    A token of −1 is the last of its row: its logits were not finite.
    """

    tokens: Int32[Array, "rows steps"]
    counts: Int32[Array, " rows"]
    told: Told


def most_ends(config: DecoderConfig) -> int:
    """Return how many token ids may end a request: all of the model's, and those of a chat."""
    return max(_MOST_ENDS, len(config.eos_token_ids) + _OF_A_CHAT)


def empty_slots(model: Decoder, slots: int, size: int, cache_dtype=None) -> Slots:
    """Return free slots, with room for `size` positions each."""
    cache = model.init_cache(slots, size, cache_dtype)
    if isinstance(cache, PackedCache):
        # Only the kernels of a single row have scratch memory.
        one = jax.eval_shape(lambda: model.init_cache(1, size, cache_dtype)).scratch
        scratch = jax.tree.map(lambda words: jnp.zeros(words.shape, words.dtype), one)
        cache = dataclasses.replace(cache, scratch=scratch)
    free = row(Sampling(), limit=0, ends=(), told=False, config=model.config)
    rows = jax.tree.map(lambda leaf: jnp.asarray(np.repeat(leaf, slots, axis=0)), free)
    return Slots(cache=dataclasses.replace(cache, length=jnp.zeros(slots, jnp.int32)), rows=rows)


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


def prefill(
    model: Decoder,
    chunk: Int32[Array, "1 t"],
    start: Int32[Array, ""],
    count: Int32[Array, ""],
    until: Int32[Array, ""],
    cache: KVCache,
) -> tuple[Float32[Array, "1 vocab"], KVCache]:
    """Return the logits after the next `count` tokens of a prompt, and the cache with them.

    Args:
      model: the decoder.
      chunk: those tokens, padded on the right.
      start: tokens of the prompt before them.
      count: tokens that are no padding.
      until: tokens of the whole prompt.
      cache: of one row, with the tokens before; it is donated.
    """
    hidden, filled = model.decode(chunk, dataclasses.replace(cache, length=start), until=until)
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    return model.logits(last), dataclasses.replace(filled, length=start + count)


def admit(
    slots: Slots, staged: KVCache, logits: Float32[Array, "1 vocab"], request: Rows, slot: Int32[Array, ""]
) -> tuple[Made, Slots]:
    """Return a request's first token, and the slots with the request in one of them.

    Args:
      slots: they are donated.
      staged: the prompt's keys and values, a cache of one row.
      logits: after the prompt.
      request: from `row`.
      slot: which one; what was there is overwritten.
    """
    request = dataclasses.replace(request, active=jnp.ones(1, bool))
    token, told = _choose(logits, request)
    cache = _put_cache(slots.cache, staged, slot)
    cache = dataclasses.replace(cache, length=cache.length.at[slot].set(staged.length))
    rows = _put(slots.rows, _advanced(request, token), slot)
    made = Made(token[:, None], jnp.ones(1, jnp.int32), jax.tree.map(lambda leaf: leaf[:, None], told))
    return made, Slots(cache=cache, rows=rows)


def move(slots: Slots, source: Int32[Array, ""], target: Int32[Array, ""]) -> Slots:
    """Return the slots, which are donated, with the request of one slot in another, and the first one free."""
    batch = _batch_axis(slots.cache)

    def of(leaf, axis=0):
        return jax.lax.dynamic_slice_in_dim(leaf, source, 1, axis=axis)

    layers = jax.tree.map(lambda leaf: of(leaf, batch), slots.cache.layers)
    cache = _put_cache(slots.cache, dataclasses.replace(slots.cache, layers=layers), target)
    cache = dataclasses.replace(cache, length=cache.length.at[target].set(cache.length[source]))
    rows = _put(slots.rows, jax.tree.map(of, slots.rows), target)
    rows = dataclasses.replace(rows, active=rows.active.at[source].set(False))
    return Slots(cache=cache, rows=rows)


def steps(
    model: Decoder,
    slots: Slots,
    keep: Bool[Array, " slots"],
    count: Int32[Array, ""],
    *,
    rows: int,
    room: int,
) -> tuple[Made, Slots]:
    """Return the next tokens of the first `rows` slots, and the slots after them.

    Args:
      model: the decoder.
      slots: they are donated.
      keep: slots whose request goes on; the others' are over, whatever they were about to do.
      count: steps at most; fewer are made where every request ends before.
      rows: how many slots take part.
      room: columns of the result, at least `count`.
    """
    active = slots.rows.active & keep
    first = jax.tree.map(lambda leaf: leaf[:rows], dataclasses.replace(slots.rows, active=active))

    def unfinished(state):
        step, first, *_ = state
        return (step < count) & first.active.any()

    def step(state):
        index, first, length, cache, made = state
        # A row that is not active stays at position 0, where there is always room.
        at = dataclasses.replace(cache, length=jnp.where(first.active, length, 0))
        hidden, cache = _decode(model, first.token, at)
        token, told = _choose(model.logits(hidden[:, 0]), first)
        columns = jax.tree.map(
            lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new[:, None], index, axis=1),
            (made.tokens, made.told),
            (token, told),
        )
        made = Made(columns[0], made.counts + first.active, columns[1])
        return index + 1, _advanced(first, token), length + first.active, cache, made

    shape = (rows, room)
    top = min(MOST_TOP, model.config.vocab_size)
    told = Told(*(jnp.zeros((*shape, *form), kind) for form, kind in _told_forms(top)))
    made = Made(jnp.zeros(shape, jnp.int32), jnp.zeros(rows, jnp.int32), told)
    # Of one shape in the loop, whichever rows have a length there.
    cache = dataclasses.replace(slots.cache, length=slots.cache.length[:rows])
    state = (jnp.int32(0), first, slots.cache.length[:rows], cache, made)
    _, first, length, cache, made = jax.lax.while_loop(unfinished, step, state)
    cache = dataclasses.replace(cache, length=slots.cache.length.at[:rows].set(length))
    whole = dataclasses.replace(slots.rows, active=active)
    return made, Slots(cache=cache, rows=_put(whole, first, 0))


def _decode(
    model: Decoder, token: Int32[Array, " rows"], cache: KVCache
) -> tuple[Float[Array, "rows 1 d"], KVCache]:
    """Return `model.decode` of a token a row; several rows' kernels have no scratch memory."""
    if not isinstance(cache, PackedCache) or len(token) == 1:
        return model.decode(token[:, None], cache)
    without = dataclasses.replace(cache, scratch=(KernelScratch(),) * len(cache.scratch))
    hidden, after = model.decode(token[:, None], without)
    assert isinstance(after, PackedCache)
    return hidden, dataclasses.replace(after, scratch=cache.scratch)


def _choose(logits: Float32[Array, "rows vocab"], rows: Rows) -> tuple[Int32[Array, " rows"], Told]:
    """Return the next token of every row, as `sampling.choose` gives it to that row alone, and what is told of it."""
    sampler: Any = rows.sampler  # every setting is there
    keys = jax.vmap(lambda seed, made: jax.random.fold_in(jax.random.key(seed), made))(rows.seed, rows.made)

    def each(sampler: Sampler):
        one = jax.vmap(lambda row, settings, key: choose(row[None], settings, None, key)[0])
        return one(logits, sampler, keys)

    drawn = rows.active & (sampler.temperature > 0)
    vocab = logits.shape[-1]
    filtered = drawn & ((sampler.top_k < vocab) | (sampler.top_p < 1) | (sampler.min_p > 0))
    told = (rows.active & rows.told).any()
    top = min(MOST_TOP, vocab)

    def nothing(token):
        return token, Told(*(jnp.zeros((len(token), *shape), kind) for shape, kind in _told_forms(top)))

    # What no request asks for is not computed: random numbers, the sorting that filters need, log-probabilities. One
    # branch for all of it, as each takes a GPU some time.
    kind = jnp.where(told, 3, jnp.where(filtered.any(), 2, drawn.any().astype(jnp.int32)))
    return jax.lax.switch(
        kind,
        [
            lambda: nothing(likeliest(logits)),
            lambda: nothing(each(Sampler(temperature=sampler.temperature))),
            lambda: nothing(each(sampler)),
            lambda: _told(logits, each(sampler), top),
        ],
    )


def _told_forms(top: int) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Return the shape of what is told of a token, and its dtype, in the order of `Told`."""
    return ((), jnp.float32), ((top,), jnp.int32), ((top,), jnp.float32)


def _told(
    logits: Float32[Array, "rows vocab"], token: Int32[Array, " rows"], top: int
) -> tuple[Int32[Array, " rows"], Told]:
    of_all = jax.nn.log_softmax(logits.astype(jnp.float32))
    likeliest, tokens = jax.lax.top_k(of_all, top)
    chosen = jnp.take_along_axis(of_all, token[:, None], axis=1)[:, 0]
    return token, Told(chosen, tokens.astype(jnp.int32), likeliest)


def _advanced(rows: Rows, token: Int32[Array, " rows"]) -> Rows:
    """Return the rows after a new token; those that were not active stay as they are."""
    failed = rows.active & (token < 0)
    token = jnp.where(rows.active & ~failed, token, rows.token)
    made = rows.made + rows.active
    ended = (token[:, None] == rows.ends).any(-1) | (made >= rows.limit) | failed
    return dataclasses.replace(rows, token=token, made=made, active=rows.active & ~ended)


def _put(rows: Rows, part: Rows, start) -> Rows:
    update = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda leaf, new: update(leaf, jnp.asarray(new), start, axis=0), rows, part)


def _put_cache(cache: KVCache, part: KVCache, slot) -> KVCache:
    axis, update = _batch_axis(cache), jax.lax.dynamic_update_slice_in_dim
    layers = jax.tree.map(lambda leaf, new: update(leaf, new, slot, axis=axis), cache.layers, part.layers)
    return dataclasses.replace(cache, layers=layers)


def _batch_axis(cache: KVCache) -> int:
    """Return the axis of the batch in a cache's arrays: after keys and values, and after layers in a stack."""
    return 1 if isinstance(cache.layers, tuple) else 2
