"""Generation across the original context of LongRoPE, as transformers' `generate` does it for the same model."""

import jax
import numpy as np
import pytest

from twla_jax.inference import generation
from twla_jax.inference.generation import generate, stream
from twla_jax.inference.sampling import Sampling
from twla_jax.models.io.huggingface import load_model

from helpers.golden import GOLDENS, Golden

PROMPT, ORIGINAL = 8, 16


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDENS / "generated" / "phi4_mini.npz")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(Golden("phi4_mini").write(tmp_path_factory.mktemp("phi4_mini")))


def test_tokens_beyond_the_original_context_are_those_of_transformers(model, expected):
    tokens = expected["tokens"]
    assert PROMPT < ORIGINAL < tokens.shape[1]
    settings = {"max_new_tokens": tokens.shape[1] - PROMPT, "eos_token_ids": ()}
    found = generate(model, tokens[:, :PROMPT], **settings)
    np.testing.assert_array_equal(found, tokens[:, PROMPT:])
    one_by_one = np.stack(list(stream(model, tokens[:, :PROMPT], **settings)), axis=1)
    np.testing.assert_array_equal(one_by_one, found)


def test_steps_with_a_cache_have_the_logits_of_transformers(model, expected, monkeypatch):
    """By chunks of 4 and padded ones, so that what decides is the length of the text and not the chunk's."""
    monkeypatch.setattr(generation, "_CHUNK", 4)
    monkeypatch.setattr(generation, "_BUCKET", 4)
    seen = []
    logits = type(model).logits

    def kept(self, h):
        y = logits(self, h)
        jax.debug.callback(lambda value: seen.append(np.asarray(value)), y)
        return y

    monkeypatch.setattr(type(model), "logits", kept)
    for length in (PROMPT, ORIGINAL - 1, ORIGINAL + 2):
        seen.clear()
        jax.clear_caches()
        steps = 3
        tokens = expected["tokens"][:, :length]
        found = list(stream(model, tokens, max_new_tokens=steps, eos_token_ids=()))
        np.testing.assert_array_equal(np.stack(found, 1), expected["tokens"][:, length : length + steps])
        jax.effects_barrier()
        wanted = expected["logits"][:, length - PROMPT : length - PROMPT + steps]
        last = seen[-1]
        assert np.abs(last - wanted[:, -1]).max() <= 1e-4 * np.abs(wanted).max()


def test_samples_go_on_with_their_random_numbers_and_their_penalty(model, expected):
    tokens = expected["tokens"][:, :PROMPT]
    sampling = Sampling(temperature=1.0, repetition_penalty=1.3, seed=5)
    whole = generate(model, tokens, max_new_tokens=14, sampling=sampling, eos_token_ids=())
    part = generate(model, tokens, max_new_tokens=5, sampling=sampling, eos_token_ids=())
    np.testing.assert_array_equal(whole[:, :5], part)
    assert len(np.unique(whole)) > 8
