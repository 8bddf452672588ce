"""How tokens are chosen, against transformers' logits processors, and what is drawn, against probabilities."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twla_jax.errors import TwlaError
from twla_jax.inference.generation import generate, stream
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.inference.sampling import Sampling, choose, keep_likely, penalize
from twla_jax.models.decoder import Decoder

from helpers.compiled import compiled_programs

GOLDENS = np.load(Path(__file__).parents[1] / "goldens" / "sampling" / "processors.npz")
PROMPT = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def processed(logits, prompt, sampling):
    """What `choose` draws from."""
    sampler, seen = sampling.sampler(), sampling.seen(prompt, logits.shape[1])
    if seen is not None:
        logits = penalize(logits, seen, sampler.repetition_penalty)
    return keep_likely(logits / sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("temperature", {"temperature": 0.6}),
        ("top_k", {"top_k": 5}),
        ("top_p", {"top_p": 0.8}),
        ("min_p", {"min_p": 0.1}),
        ("repetition_penalty", {"repetition_penalty": 1.4}),
        ("all", {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3}),
    ],
)
def test_logits_are_those_of_transformers_processors(name, settings):
    found = processed(GOLDENS["logits"], GOLDENS["prompt"], Sampling(**{"temperature": 1.0, **settings}))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(GOLDENS[name]))
    kept = np.isfinite(GOLDENS[name])
    np.testing.assert_allclose(np.asarray(found)[kept], GOLDENS[name][kept], rtol=1e-6)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_the_likeliest_token_always_stays(settings):
    found = processed(GOLDENS["logits"], GOLDENS["prompt"], Sampling(temperature=1.0, **settings))
    np.testing.assert_array_equal(np.isfinite(found).sum(1), 1)
    np.testing.assert_array_equal(found.argmax(1), GOLDENS["logits"].argmax(1))


def test_a_top_k_beyond_the_vocabulary_keeps_all_of_it():
    logits = GOLDENS["logits"]
    np.testing.assert_array_equal(keep_likely(logits, top_k=jnp.int32(1000)), logits)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampling(temperature=1.0, top_p=0.9).sampler()
    drawn = np.asarray(choose(jnp.tile(logits, (20_000, 1)), sampler, None, jax.random.key(0)))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    expected = np.array([0.5, 0.3, 0.15, 0.0]) / 0.95  # the first three have 0.9 together, and no fewer
    np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / np.sqrt(len(drawn)))
    assert shares[3] == 0


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 2, "top_p": 0.9}]
)
def test_no_token_is_made_of_what_is_not_finite(settings):
    rows = np.tile(np.float32([1, 5, 2, 0]), (5, 1))
    rows[1, 2], rows[2, 0], rows[3, :] = np.nan, np.inf, -np.inf
    rows[4, 1] = -np.inf  # a token that cannot be: the others are as they are
    sampling = Sampling(**settings)
    found = np.asarray(choose(jnp.asarray(rows), sampling.sampler(), None, jax.random.key(0)))
    np.testing.assert_array_equal(found < 0, [False, True, True, True, False])
    assert found[4] != 1


@pytest.fixture(scope="module")
def model(tiny_config):
    return Decoder(tiny_config, rngs=nnx.Rngs(0))


def test_a_penalty_counts_the_prompt_and_what_was_generated(model):
    """Greedy with a penalty that nothing survives: every token is one that was not there before."""
    sampling = Sampling(repetition_penalty=100)
    found = generate(model, PROMPT, max_new_tokens=20, sampling=sampling, eos_token_ids=())
    for row in np.concatenate([PROMPT[:, 2:], found], axis=1):
        assert len(set(row.tolist())) == len(row)


@pytest.mark.parametrize("packed", [False, True])
def test_all_settings_give_the_same_at_once_and_one_by_one(model, packed):
    model = prepare_for_inference(model, unpack=False) if packed else model
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=7)
    found = generate(model, PROMPT, max_new_tokens=10, sampling=sampling)
    steps = stream(model, PROMPT, max_new_tokens=10, sampling=sampling)
    np.testing.assert_array_equal(found, np.stack(list(steps), axis=1))
    again = generate(model, PROMPT, max_new_tokens=10, sampling=sampling)
    np.testing.assert_array_equal(found, again)


def test_other_values_compile_nothing_anew():
    draw = jax.jit(choose)
    logits = GOLDENS["logits"]
    for top_p, top_k in ((0.9, 5), (0.8, 7)):
        draw(logits, Sampling(temperature=top_p, top_p=top_p, top_k=top_k).sampler(), None, jax.random.key(0))
    assert compiled_programs(draw) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_a_value_out_of_range_is_named(setting):
    with pytest.raises(TwlaError, match=next(iter(setting))):
        Sampling(**setting)


def test_a_temperature_is_given_once(model):
    with pytest.raises(TwlaError, match="is a part of sampling"):
        generate(model, PROMPT, max_new_tokens=1, temperature=1.0, sampling=Sampling())
    with pytest.raises(TwlaError, match="sampling: is a dict"):
        generate(model, PROMPT, max_new_tokens=1, sampling={"top_k": 5})
