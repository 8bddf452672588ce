"""Keeps slots in one cache: what the device holds of every running request, and the programs that change it.

Prompts are read several at once, padded to one of few lengths, and then copied into slots; a longer one is read alone,
by chunks, in a cache of one row. Slots have settings and random numbers of their own, and those that are free are
computed with the others. So nothing that a request does changes a shape.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from twla_jax.inference.packed_cache import PackedCache
from twla_jax.inference.sampling import Sampling
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache
from twla_jax.serving.rows import Made, Rows, Told, advanced, row, told_tokens


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


def read(
    model: Decoder,
    slots: Slots,
    prompts: Int32[Array, "n t"],
    counts: Int32[Array, " n"],
    requests: Rows,
    places: Int32[Array, " n"],
) -> tuple[Made, Slots]:
    """Return the first token of some requests, and the slots with these requests in them.

    Nothing in it branches: a GPU would wait for the host there, and the host for the GPU.

    Args:
      model: the decoder.
      slots: they are donated.
      prompts: whole ones, padded on the right.
      counts: tokens that are no padding, at least 1.
      requests: from `row`.
      places: their slots, all different; what was there is overwritten. Beyond the last slot for rows of no request.
    """
    n, width = prompts.shape
    entries = jax.tree.leaves(slots.cache.layers)[0]
    # Of one row, LongRoPE must know the length without padding.
    until = counts[0] if n == 1 else None
    hidden, read = model.decode(prompts, model.init_cache(n, width, entries.dtype), until=until)
    requests = dataclasses.replace(requests, active=places < len(slots.rows.active))
    token, told = told_tokens(model.logits(hidden[jnp.arange(n), counts - 1]), requests)
    axis = batch_axis(slots.cache)

    def put(leaf, new):
        at = leaf.at[(slice(None),) * axis + (places,)]
        # All of the row: numbers that are not finite would reach another request from beyond its end.
        leaf = at.set(0, mode="drop", unique_indices=True)
        at = leaf.at[(slice(None),) * axis + (places, slice(None), slice(0, width))]
        return at.set(new, mode="drop", unique_indices=True)

    def put_row(leaf, new):
        return leaf.at[places].set(new, mode="drop", unique_indices=True)

    layers = jax.tree.map(put, slots.cache.layers, read.layers)
    cache = dataclasses.replace(slots.cache, layers=layers, length=put_row(slots.cache.length, counts))
    rows = jax.tree.map(put_row, slots.rows, advanced(requests, token))
    return _first(token, told), Slots(cache=cache, rows=rows)


def _first(token: Int32[Array, " n"], told: Told) -> Made:
    """Return the first tokens of some requests as a call's."""
    return Made(
        token[:, None], jnp.ones(len(token), jnp.int32), jax.tree.map(lambda leaf: leaf[:, None], told)
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
    token, told = told_tokens(logits, request)
    cache = _put_cache(slots.cache, staged, slot)
    cache = dataclasses.replace(cache, length=cache.length.at[slot].set(staged.length))
    rows = put_rows(slots.rows, advanced(request, token), slot)
    return _first(token, told), Slots(cache=cache, rows=rows)


def move(slots: Slots, source: Int32[Array, ""], target: Int32[Array, ""]) -> Slots:
    """Return the slots, which are donated, with the request of one slot in another, and the first one free."""
    batch = batch_axis(slots.cache)

    def of(leaf, axis=0):
        return jax.lax.dynamic_slice_in_dim(leaf, source, 1, axis=axis)

    layers = jax.tree.map(lambda leaf: of(leaf, batch), slots.cache.layers)
    cache = _put_cache(slots.cache, dataclasses.replace(slots.cache, layers=layers), target)
    cache = dataclasses.replace(cache, length=cache.length.at[target].set(cache.length[source]))
    rows = put_rows(slots.rows, jax.tree.map(of, slots.rows), target)
    rows = dataclasses.replace(rows, active=rows.active.at[source].set(False))
    return Slots(cache=cache, rows=rows)


def put_rows(rows: Rows, part: Rows, start: int | Int32[Array, ""]) -> Rows:
    """Return the rows with others in place of some, from `start` on."""
    update = jax.lax.dynamic_update_slice_in_dim
    return jax.tree.map(lambda leaf, new: update(leaf, jnp.asarray(new), start, axis=0), rows, part)


def _put_cache(cache: KVCache, part: KVCache, slot) -> KVCache:
    axis, update = batch_axis(cache), jax.lax.dynamic_update_slice_in_dim
    layers = jax.tree.map(lambda leaf, new: update(leaf, new, slot, axis=axis), cache.layers, part.layers)
    return dataclasses.replace(cache, layers=layers)


def batch_axis(cache: KVCache) -> int:
    """Return the axis of the batch in a cache's arrays: after keys and values, and after layers in a stack."""
    return 1 if isinstance(cache.layers, tuple) else 2
