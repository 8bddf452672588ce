"""Keeps slots in one cache: what the device holds of every running request, and the programs that change it.

A request is prefilled in a cache of its own row, by chunks of few lengths, and then copied into a slot. One decode step
takes the first `rows` slots along, each at its own position, with its own settings and random numbers; slots that are
free or finished are computed, too, at position 0, and ignored. So nothing that a request does changes a shape.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from twla_jax.inference.packed_cache import KernelScratch, PackedCache
from twla_jax.inference.sampling import Sampling
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache
from twla_jax.serving.rows import MOST_TOP, Made, Rows, Told, advanced, next_tokens, row, told_forms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """Holds the cache of all slots, each with its own length, and their rows."""

    cache: KVCache
    rows: Rows


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
    token, told = next_tokens(logits, request)
    cache = _put_cache(slots.cache, staged, slot)
    cache = dataclasses.replace(cache, length=cache.length.at[slot].set(staged.length))
    rows = _put(slots.rows, advanced(request, token), slot)
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
        token, told = next_tokens(model.logits(hidden[:, 0]), first)
        columns = jax.tree.map(
            lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new[:, None], index, axis=1),
            (made.tokens, made.told),
            (token, told),
        )
        made = Made(columns[0], made.counts + first.active, columns[1])
        return index + 1, advanced(first, token), length + first.active, cache, made

    shape = (rows, room)
    top = min(MOST_TOP, model.config.vocab_size)
    told = Told(*(jnp.zeros((*shape, *form), kind) for form, kind in told_forms(top)))
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
