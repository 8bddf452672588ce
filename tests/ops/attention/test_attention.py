"""Attention to an int8 cache, with sinks, and of chunks in two parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.ops.attention import fused, reference
from twla_jax.ops.attention.kv_cache import LayerKV, dequantize, empty_layer, write
from twla_jax.ops.attention.reference import Positions


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [9, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_a_decode_step_mixes_what_the_cache_stands_for(heads, kv_heads, window, with_sinks):
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = jax.random.normal(keys[0], (2, 2, 30, kv_heads, 16))
    layer = write(empty_layer((2, 2, kv_heads, 40, 16), jnp.int8), k, v, jnp.int32(0))
    q = jax.random.normal(keys[1], (2, 1, heads, 16))
    angles = jnp.zeros((1, 8))
    positions = Positions(query=jnp.array([29]), key=jnp.arange(40), cos=angles, sin=angles)
    first = max(0, 30 - window)
    k, v = (
        np.repeat(np.asarray(each, float), heads // kv_heads, axis=1)[:, :, first:30]
        for each in dequantize(layer, jnp.float32)
    )
    scores = np.einsum("bhd,bhsd->bhs", np.asarray(q[:, 0], float), k) / 4
    sinks = np.linspace(-1, 6, heads) if with_sinks else np.full(heads, -np.inf)
    weights = np.exp(scores) / (np.exp(scores).sum(-1) + np.exp(sinks))[..., None]
    expected = np.einsum("bhs,bhsd->bhd", weights, v).reshape(2, 1, -1)
    of_heads = jnp.asarray(sinks, jnp.float32) if with_sinks else None
    for form in (reference.attention, reference._one_query, reference._scaled_products):
        found = form(q, layer, positions, jnp.int32(window), sinks=of_heads)
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_sinks_take_their_part_of_every_query_also_of_many_at_a_time(monkeypatch):
    monkeypatch.setattr(reference, "_QUERY_CHUNK", 8)
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(2, 21, heads, 16)) for heads in (6, 2, 2))
    sinks, window = np.linspace(-1, 3, 6), 5
    angles = jnp.zeros((21, 8))
    positions = Positions(query=jnp.arange(21), key=jnp.arange(21), cos=angles, sin=angles)
    entries = jnp.asarray(np.stack([k, v]).swapaxes(2, 3), jnp.float32)
    found = reference.attention(
        jnp.asarray(q, jnp.float32),
        LayerKV(entries=entries),
        positions,
        jnp.int32(window),
        sinks=jnp.asarray(sinks, jnp.float32),
    ).reshape(2, 21, 6, 16)
    for row, at, head in np.ndindex(2, 21, 6):
        seen = slice(max(0, at + 1 - window), at + 1)
        weights = np.exp(k[row, seen, head // 3] @ q[row, at, head] / 4)
        expected = weights @ v[row, seen, head // 3] / (weights.sum() + np.exp(sinks[head]))
        np.testing.assert_allclose(found[row, at, head], expected, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 19])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_a_chunk_in_two_parts_mixes_what_the_cache_stands_for(dtype, start):
    """cuDNN's kernels, which exist on GPUs alone, have the place of the plain products here."""
    t, room, heads, kv_heads = 7, 40, 6, 2
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = jax.random.normal(keys[0], (2, 3, room, kv_heads, 16))  # past the chunk lies what must not be read
    layer = write(empty_layer((2, 3, kv_heads, room, 16), dtype), k, v, jnp.int32(0))
    q = 2 * jax.random.normal(keys[1], (2, t, heads, 16))  # of two of three rows
    at = start + jnp.arange(t)
    positions = Positions(query=at, key=jnp.arange(room), cos=jnp.zeros((t, 8)), sin=jnp.zeros((t, 8)))
    k, v = (np.repeat(np.asarray(each, float), 3, axis=1)[:2] for each in dequantize(layer, jnp.float32))
    scores = np.einsum("bthd,bhsd->bhts", np.asarray(q, float), k) / 4
    weights = np.where(np.arange(room) <= np.asarray(at)[:, None], np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bhsd->bthd", weights, v).reshape(2, t, -1)
    found = fused.chunk_attention(q, layer, positions, implementation="xla")
    np.testing.assert_allclose(found, expected, atol=1e-5)
