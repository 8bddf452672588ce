"""Runs decode steps on the first slots, several in a loop on the device."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from twla_jax.inference.packed_cache import KernelScratch, PackedCache
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache
from twla_jax.serving.rows import MOST_TOP, Made, Rows, Told, advanced, drawn_tokens, next_tokens, told_forms
from twla_jax.serving.slots import Slots, put_rows


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
    whole, first, cache = _begun(slots, keep, rows)

    def unfinished(state):
        step, first, *_ = state
        return (step < count) & first.active.any()

    def step(state):
        index, first, length, cache, made = state
        logits, cache = _logits(model, first, length, cache)
        token, told = next_tokens(logits, first)
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
    state = (jnp.int32(0), first, slots.cache.length[:rows], cache, made)
    _, first, length, cache, made = jax.lax.while_loop(unfinished, step, state)
    return made, _ended(slots, whole, first, length, cache)


def fixed_steps(
    model: Decoder, slots: Slots, keep: Bool[Array, " slots"], *, rows: int, count: int, filtered: bool
) -> tuple[Made, Slots]:
    """Return what `steps` does for requests without log-probabilities, always after `count` steps.

    A GPU's loop whose end is known, and in which nothing branches, is handed over at once. In `steps` the host waits
    after every step for whether there is another, and can prepare nothing meanwhile.

    Args:
      model: the decoder.
      slots: they are donated.
      keep: as `steps` takes it.
      rows: how many slots take part.
      count: steps; requests that end before wait for the last one.
      filtered: whether any request has filters.
    """
    whole, first, cache = _begun(slots, keep, rows)

    def step(index, state):
        first, length, cache, tokens, counts = state
        logits, cache = _logits(model, first, length, cache)
        token = drawn_tokens(logits, first, filtered=filtered)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, axis=1)
        return advanced(first, token), length + first.active, cache, tokens, counts + first.active

    made = jnp.zeros((rows, count), jnp.int32), jnp.zeros(rows, jnp.int32)
    state = (first, slots.cache.length[:rows], cache, *made)
    first, length, cache, tokens, counts = jax.lax.fori_loop(0, count, step, state)
    return Made(tokens, counts, None), _ended(slots, whole, first, length, cache)


def _begun(slots: Slots, keep: Bool[Array, " slots"], rows: int) -> tuple[Rows, Rows, KVCache]:
    """Return the rows of all slots whose request goes on, those of the first, and the cache with their lengths alone.

    So the cache is of one shape in the loop, whichever rows have a length there.
    """
    whole = dataclasses.replace(slots.rows, active=slots.rows.active & keep)
    cache = dataclasses.replace(slots.cache, length=slots.cache.length[:rows])
    return whole, jax.tree.map(lambda leaf: leaf[:rows], whole), cache


def _ended(slots: Slots, whole: Rows, first: Rows, length: Int32[Array, " rows"], cache: KVCache) -> Slots:
    """Return the slots after a loop over the first rows."""
    cache = dataclasses.replace(cache, length=slots.cache.length.at[: len(length)].set(length))
    return Slots(cache=cache, rows=put_rows(whole, first, 0))


def _logits(
    model: Decoder, rows: Rows, length: Int32[Array, " rows"], cache: KVCache
) -> tuple[Float32[Array, "rows vocab"], KVCache]:
    """Return the logits after the last token of each row, and the cache with it."""
    # A row that is not active stays at position 0, where there is always room.
    at = dataclasses.replace(cache, length=jnp.where(rows.active, length, 0))
    hidden, cache = _decode(model, rows.token, at)
    return model.logits(hidden[:, 0]), cache


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
