"""Divergence and agreement by their definitions, against numpy in float64; the worst text last."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

import twla_jax
from twla_jax.errors import TwlaError
from twla_jax.evaluation.divergence import window_divergence
from twla_jax.evaluation.domains import evaluate_domains, format_domains
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.models.stored_layers import StoredLayers

QUIET = {"progress": False, "chunk": 4}


@pytest.fixture(scope="module")
def models(tiny_config):
    """A model and the original that it is compared with, alike enough to agree now and then."""
    original = Decoder(tiny_config, rngs=nnx.Rngs(0))
    noise = Decoder(tiny_config, rngs=nnx.Rngs(1))
    model = jax.tree.map(lambda a, b: a + 0.2 * b, original, noise)
    return model, original


@pytest.fixture(scope="module")
def texts(tiny_config):
    rng = np.random.default_rng(1)
    return {name: rng.integers(0, tiny_config.vocab_size, length) for name, length in (("a", 39), ("b", 24))}


def log_probabilities(model, windows):
    logits = np.asarray(model(windows), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_divergence_and_agreement_are_those_of_their_definitions(models, texts):
    windows = texts["a"].reshape(3, 13).astype(np.int32)
    q, p = (log_probabilities(model, windows) for model in models)
    targets = windows[:, 1:, None]
    expected = {
        "nll": -np.take_along_axis(q, targets, -1)[..., 0],
        "original_nll": -np.take_along_axis(p, targets, -1)[..., 0],
        "kl": (np.exp(p) * (p - q)).sum(-1),
        "agreement": q.argmax(-1) == p.argmax(-1),
    }
    # 5 does not divide the 12 predictions.
    found = window_divergence(*models, windows, chunk=5)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.mean(-1), rtol=2e-5, err_msg=name)
    assert 0 < found["agreement"].mean() < 1


def test_models_in_files_score_as_in_memory(models, texts):
    def in_files(model):
        kernel = np.asarray(model.blocks.up.kernel.get_value())
        return replace(
            model, {"blocks.up.kernel": StoredLayers(lambda i: kernel[i], kernel.shape, kernel.dtype)}
        )

    stored = [in_files(model) for model in models]
    one = evaluate_domains(stored[0], texts, original=stored[1], seq_len=8, **QUIET)
    other = evaluate_domains(models[0], texts, original=models[1], seq_len=8, **QUIET)
    for row, expected in zip(one["domains"], other["domains"], strict=True):
        assert row.pop("name") == expected.pop("name")
        assert row == pytest.approx(expected, rel=1e-4)
    windows = texts["b"].reshape(3, 8)
    one, other = (twla_jax.evaluate(model, windows, **QUIET) for model in (stored[0], models[0]))
    assert one == pytest.approx(other, rel=1e-5)


def test_every_text_has_a_row_and_the_worst_is_last(models, texts):
    # 2 divides neither the 4 windows of one text nor, with the rest dropped, the 3 of the other.
    result = evaluate_domains(models[0], texts, original=models[1], seq_len=8, batch_size=2, **QUIET)
    rows = {row["name"]: row for row in result["domains"]}
    for name, tokens in texts.items():
        windows = tokens[: len(tokens) // 8 * 8].reshape(-1, 8)
        q, p = (log_probabilities(model, windows) for model in models)
        targets = windows[:, 1:, None]
        nll, original_nll = (-np.take_along_axis(each, targets, -1).mean() for each in (q, p))
        row = rows[name]
        assert (row["windows"], row["tokens"]) == (len(windows), windows.size)
        assert row["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
        assert row["original_perplexity"] == pytest.approx(math.exp(original_nll), rel=1e-5)
        assert row["ratio"] == pytest.approx(math.exp(nll - original_nll), rel=1e-5)
        assert row["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    ratios = [row["ratio"] for row in result["domains"]]
    assert ratios == sorted(ratios)
    assert result["worst"] == result["domains"][-1]["name"]
    assert format_domains(result).splitlines()[-1].startswith(result["worst"])


def test_a_model_is_no_distance_from_itself(models, texts):
    (row, _) = evaluate_domains(models[0], texts, original=models[0], seq_len=8, **QUIET)["domains"]
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert (row["agreement"], row["ratio"]) == (1, 1)


def test_without_an_original_texts_go_by_perplexity(models, texts):
    result = evaluate_domains(models[0], texts, seq_len=8, max_windows=2, **QUIET)
    assert [row["windows"] for row in result["domains"]] == [2, 2]
    alone = twla_jax.evaluate(models[0], texts["a"], seq_len=8, max_windows=2, **QUIET)["perplexity"]
    assert {row["name"]: row["perplexity"] for row in result["domains"]}["a"] == pytest.approx(alone)


def test_unusable_texts_are_named(models, texts):
    with pytest.raises(TwlaError, match="text 'b': the text has 24 tokens, fewer than one window"):
        evaluate_domains(models[0], texts, seq_len=30, **QUIET)
    with pytest.raises(TwlaError, match="no text"):
        evaluate_domains(models[0], {}, **QUIET)
    other = Decoder(dataclasses.replace(models[0].config, vocab_size=50), rngs=nnx.Rngs(0))
    with pytest.raises(TwlaError, match="vocabularies of 97 and 50 tokens"):
        evaluate_domains(models[0], texts, original=other, seq_len=8, **QUIET)
