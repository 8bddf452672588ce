"""Perplexity, by its definition."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import cut_windows, evaluate
from twla_jax.inference.generation import generate
from twla_jax.models.decoder import Decoder
from twla_jax.models.io.readers import load_model


@pytest.fixture(scope="module")
def model(tiny_config):
    return Decoder(tiny_config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens(tiny_config):
    return np.random.default_rng(1).integers(0, tiny_config.vocab_size, 5 * 16 + 7)


def test_perplexity_is_exp_of_the_mean_nll_over_windows(model, tokens):
    windows = tokens[:80].reshape(5, 16)
    log_probabilities = np.asarray(jax.nn.log_softmax(model(windows)))[:, :-1]
    nll = -np.take_along_axis(log_probabilities, windows[:, 1:, None], axis=-1).mean()
    # 3 divides neither the 5 windows nor the 15 predictions that chunks of 4 cover.
    result = evaluate(model, tokens, seq_len=16, batch_size=3, chunk=4, progress=False)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert (result["windows"], result["tokens"], result["seq_len"]) == (5, 80, 16)


def test_max_windows_takes_the_first(model, tokens):
    limited = evaluate(model, tokens, seq_len=16, max_windows=2, batch_size=3, chunk=4, progress=False)
    assert limited == evaluate(model, tokens[:32].reshape(2, 16), batch_size=3, chunk=4, progress=False)
    assert limited["windows"] == 2


def test_the_bar_goes_to_stderr(model, tokens, capsys):
    evaluate(model, tokens, seq_len=16, batch_size=3, chunk=4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "evaluate" in captured.err


def test_unusable_inputs_are_named(model, tokens):
    with pytest.raises(TwlaError, match="87 tokens, fewer than one window of seq_len 100"):
        evaluate(model, tokens, seq_len=100)
    with pytest.raises(TwlaError, match="token id 97 is not in the model's vocabulary of 97"):
        evaluate(model, np.full(16, 97), seq_len=16)
    with pytest.raises(TwlaError, match="max_windows 0"):
        evaluate(model, tokens, seq_len=16, max_windows=0)
    with pytest.raises(TwlaError, match="seq_len 1"):
        cut_windows(tokens, 1)


def test_a_trained_model_expects_the_story_it_tells_and_not_its_words_in_any_order(stories):
    model = load_model(stories)
    story = np.concatenate([[1], generate(model, np.array([[1]]), max_new_tokens=63, eos_token_ids=())[0]])
    shuffled = np.random.default_rng(0).permutation(story)
    score = functools.partial(evaluate, model, seq_len=64, chunk=64, progress=False)
    assert score(story)["perplexity"] < 3
    assert score(shuffled)["perplexity"] > 100
