"""The loop of decode steps as a whole, compiled for chips that are not there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax import generation
from twla_jax.benchmark import SHAPES, shapes


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "bits", "cache_dtype"),
    [("h100", 8, None), ("h100", 8, jnp.int8), ("h100", None, None), ("v5e", 8, None)],
)
def test_a_step_copies_neither_cache_nor_weights(target, bits, cache_dtype, compile_for):
    # A head of 65 MB, and 21 MB of keys and values, which other layouts or types would copy.
    config = dataclasses.replace(SHAPES["tiny"], vocab_size=64000, num_kv_heads=8)
    model = shapes.random_decoder(config, activation_bits=bits)
    cache = model.init_cache(1, 5120, cache_dtype)

    def loop(model, token, cache, key):
        ends = np.zeros(0, np.int32)
        return generation.steps(model, token, cache, jnp.int32(9), jnp.float32(0), key, ends, room=64)

    compiled = compile_for(target, loop, model, jnp.zeros(1, jnp.int32), cache, jax.random.key(0))
    assert compiled.memory_analysis().temp_size_in_bytes < 8e6
