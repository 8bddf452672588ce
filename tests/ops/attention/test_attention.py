"""Attention to an int8 cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.ops.attention import reference
from twla_jax.ops.attention.kv_cache import dequantize, empty_layer, write
from twla_jax.ops.attention.reference import Positions


@pytest.mark.parametrize("window", [9, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_a_decode_step_mixes_what_the_cache_stands_for(heads, kv_heads, window):
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
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhs,bhsd->bhd", weights / weights.sum(-1, keepdims=True), v).reshape(2, 1, -1)
    for form in (reference.attention, reference._one_query, reference._scaled_products):
        found = form(q, layer, positions, jnp.int32(window))
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
