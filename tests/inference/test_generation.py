"""Generation: what comes out, when it ends, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twla_jax.errors import TwlaError
from twla_jax.inference import generation
from twla_jax.inference.generation import generate, stream
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.inference.sampling import Sampling
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.ops.attention import fused

from helpers.compiled import compiled_programs
from helpers.overflowing import overflowing

PROMPT = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def model(tiny_config):
    return Decoder(tiny_config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def greedy(model):
    """The likeliest continuation, by the whole forward pass at every step."""
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = np.zeros((2, 17), np.int32)
    tokens[:, :5] = PROMPT
    for end in range(5, 17):
        tokens[:, end] = forward(model, tokens)[:, end - 1].argmax(-1)
    return tokens[:, 5:]


def test_temperature_zero_takes_the_likeliest_token_of_the_whole_forward(model, greedy):
    np.testing.assert_array_equal(generate(model, PROMPT, max_new_tokens=12), greedy)


def test_tokens_arrive_one_by_one(model, greedy):
    steps = stream(model, PROMPT, max_new_tokens=12)
    np.testing.assert_array_equal(next(steps), greedy[:, 0])
    np.testing.assert_array_equal(next(steps), greedy[:, 1])


def test_a_row_ends_at_its_eos_and_the_stream_when_all_have(model, greedy):
    first, second = int(greedy[0, 2]), int(greedy[1, 4])
    out = generate(model, PROMPT, max_new_tokens=12, eos_token_ids=(first, second))
    ends = [next(i for i, token in enumerate(row) if token in (first, second)) for row in greedy]
    assert out.shape[1] == max(ends) + 1
    for row, expected, end in zip(out, greedy, ends, strict=True):
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert set(row[end:]) == {expected[end]}


def test_logits_that_are_not_finite_end_it_with_an_error(model, greedy):
    """A token of the prompt overflows, or the third one that is made."""
    for token, made in ((int(PROMPT[1, 0]), 0), (int(greedy[0, 2]), 3)):
        broken = overflowing(model, token)
        with pytest.raises(TwlaError, match=r"not finite numbers.* overflow float32"):
            generate(broken, PROMPT, max_new_tokens=12)
        steps = stream(broken, PROMPT, max_new_tokens=12)
        for index in range(made):
            assert next(steps)[0] == greedy[0, index]
        with pytest.raises(TwlaError, match="not finite numbers"):
            next(steps)


def test_sampling_follows_the_key_and_the_temperature(model):
    def sample(seed, temperature):
        return generate(model, PROMPT, max_new_tokens=12, temperature=temperature, key=jax.random.key(seed))

    np.testing.assert_array_equal(sample(0, 1.0), sample(0, 1.0))
    assert (sample(0, 1.0) != sample(1, 1.0)).any()
    np.testing.assert_array_equal(sample(0, 1e-5), sample(1, 0.0))


def test_prompts_of_one_bucket_compile_once(model):
    generate(model, PROMPT[:1, :2], max_new_tokens=4)
    compiled = compiled_programs(generation._prefill), compiled_programs(generation.steps)
    for length in (1, 3, 5):
        generate(model, PROMPT[:1, :length], max_new_tokens=length + 1)
    assert compiled == (compiled_programs(generation._prefill), compiled_programs(generation.steps))


@pytest.mark.parametrize(("long_prompt", "programs"), [(8192, 1), (9, 2)])
def test_a_long_prompt_goes_in_by_chunks_of_one_compilation(
    model, greedy, long_prompt, programs, monkeypatch
):
    monkeypatch.setattr(generation, "_CHUNK", 4)
    monkeypatch.setattr(generation, "_BUCKET", 2)
    monkeypatch.setattr(generation, "_LONG_CHUNK", 8)
    monkeypatch.setattr(generation, "_LONG_PROMPT", long_prompt)
    compiled = compiled_programs(generation._prefill)
    whole = np.concatenate([PROMPT, greedy], axis=1)
    for length in (5, 8, 11):
        found = generate(model, whole[:, :length], max_new_tokens=17 - length)
        np.testing.assert_array_equal(found, whole[:, length:])
    assert compiled_programs(generation._prefill) - compiled <= 2 * programs  # by the size of the cache


def test_chunks_that_attend_in_two_parts_give_the_same(model, monkeypatch):
    """As on a GPU, with plain products in the place of cuDNN's kernels."""
    monkeypatch.setattr(
        fused, "chunk_attention", functools.partial(fused.chunk_attention, implementation="xla")
    )
    hidden = {}
    for in_parts in (False, True):
        cache = model.init_cache(2, 8)
        _, cache = replace(model, fused=in_parts).decode(PROMPT[:, :2], cache)
        hidden[in_parts], _ = replace(model, fused=in_parts).decode(PROMPT[:, 2:], cache)
    assert (hidden[True] != hidden[False]).any()
    np.testing.assert_allclose(hidden[True], hidden[False], atol=1e-5 * np.abs(hidden[False]).max())


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_an_int8_cache_moves_the_output_by_a_percent_at_most(tiny_config, prepared, kv_heads):
    model = Decoder(dataclasses.replace(tiny_config, num_kv_heads=kv_heads), rngs=nnx.Rngs(0))
    model = prepare_for_inference(model, unpack=False) if prepared else model
    hidden = {}
    for dtype in (None, jnp.int8):
        cache = model.init_cache(2, 8, dtype)
        _, cache = model.decode(PROMPT[:, :4], cache)
        hidden[dtype] = np.asarray(model.decode(PROMPT[:, 4:], cache)[0])
    error = np.linalg.norm(hidden[jnp.int8] - hidden[None]) / np.linalg.norm(hidden[None])
    assert 0 < error < 1e-2
    assert cache.layer(0).entries.dtype == jnp.int8
    assert generate(model, PROMPT, max_new_tokens=3, cache_dtype=jnp.int8).shape == (2, 3)


def test_the_cache_is_updated_in_place(model):
    cache = model.init_cache(1, 64)
    arguments = (model, jnp.zeros(1, jnp.int32), cache, Sampling().sampler(), jax.random.key(0))
    loop = (model, jnp.zeros(1, jnp.int32), cache, jnp.int32(9), *arguments[3:], np.zeros(0, np.int32))
    for lowered in (generation.step.lower(*arguments), generation.steps.lower(*loop, room=64)):
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))


def test_all_at_once_is_what_arrives_one_by_one(model):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "key": jax.random.key(3)}
    found = generate(model, PROMPT, **settings)
    np.testing.assert_array_equal(found, np.stack(list(stream(model, PROMPT, **settings)), axis=1))


def test_unusable_settings_are_named(model):
    for settings, named in (
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 2044}, "with 5 prompt tokens 2049, above the model's 2048"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature -1.0"),
    ):
        with pytest.raises(TwlaError, match=named):
            stream(model, PROMPT, **settings)
    with pytest.raises(TwlaError, match="prompt: no token at all"):
        stream(model, np.zeros((1, 0), int), max_new_tokens=1)
    with pytest.raises(TwlaError, match="token id 97"):
        stream(model, np.array([[97]]), max_new_tokens=1)
