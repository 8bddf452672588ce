"""What the harness asks of a model, against the definitions by brute force in float64, one text at a time."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from twla_jax.errors import TwlaError
from twla_jax.evaluation.harness import HarnessModel
from twla_jax.evaluation.likelihood import continuation_loglikelihoods, rolling_pairs
from twla_jax.inference import generation
from twla_jax.jobs import loading
from twla_jax.models.decoder import Decoder

from helpers.overflowing import overflowing

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"


class Tokenizer:
    """A letter a token, and BOS."""

    bos_token, bos_token_id, eos_token_id = "<s>", 0, 1

    def __call__(self, text, add_special_tokens=True):
        bos = [0] if text.startswith("<s>") or add_special_tokens else []
        return {"input_ids": bos + [2 + LETTERS.index(letter) for letter in text.removeprefix("<s>")]}

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(LETTERS[(i - 2) % len(LETTERS)] for i in ids if i > 1)


@pytest.fixture(scope="module")
def model(tiny_config):
    return Decoder(tiny_config, rngs=nnx.Rngs(0))


@pytest.fixture
def harness(model):
    return HarnessModel(model, Tokenizer(), progress=False)


def requests(*args):
    return [types.SimpleNamespace(args=each) for each in args]


def brute_force(model, context, continuation):
    """`log p` of a continuation, and whether each of its tokens is the likeliest, from all logits of one text."""
    tokens = np.asarray([*context, *continuation])
    logits = np.asarray(model(tokens[None, :-1])[0], np.float64)[len(context) - 1 :]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    value = logs[np.arange(len(continuation)), continuation].sum()
    return value, bool((logits.argmax(-1) == continuation).all())


def same(found, expected):
    np.testing.assert_allclose([each[0] for each in found], [each[0] for each in expected], rtol=2e-5)
    assert [each[1] for each in found] == [each[1] for each in expected]


def test_loglikelihoods_are_those_of_one_text_at_a_time(model, tiny_config):
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (5, 3), (40, 40), (70, 2), (3, 90), (60, 4), (2, 2)]
    pairs = [tuple(rng.integers(0, tiny_config.vocab_size, n).tolist() for n in size) for size in sizes]
    # A continuation that the model would have chosen itself.
    greedy = generation.generate(model, np.asarray([pairs[1][0]]), max_new_tokens=3)[0].tolist()
    pairs.append((pairs[1][0], greedy))
    expected = [brute_force(model, *pair) for pair in pairs]
    assert [greedy for _, greedy in expected] == [False] * len(sizes) + [True]
    # 128 tokens at a time: two rows of 64, so that batches are filled up, and one of 128.
    same(continuation_loglikelihoods(model, pairs, batch_tokens=128), expected)


def test_a_long_context_loses_its_beginning(model):
    context, continuation = list(range(2, 82)), [5, 6, 7]
    found = continuation_loglikelihoods(model, [(context, continuation)], max_length=32)
    # 32 tokens are read: the last token of all is only predicted.
    same(found, [brute_force(model, context[-30:], continuation)])
    with pytest.raises(TwlaError, match="a continuation has 33 tokens, and the model reads 32"):
        continuation_loglikelihoods(model, [([1], [2] * 33)], max_length=32)
    with pytest.raises(TwlaError, match="at least one token each"):
        continuation_loglikelihoods(model, [([1], [])])
    with pytest.raises(TwlaError, match="vocabulary"):
        continuation_loglikelihoods(model, [([1], [97])])


def test_no_answer_is_made_of_predictions_that_are_not_finite(model):
    broken = overflowing(model, 50)
    same(continuation_loglikelihoods(broken, [([2, 3], [4])]), [brute_force(model, [2, 3], [4])])
    with pytest.raises(TwlaError, match=r"not finite numbers .*, so there is no likelihood"):
        continuation_loglikelihoods(broken, [([2, 3], [4]), ([2, 50], [4])])


@pytest.mark.parametrize("length", [1, 4, 5, 8, 11])
def test_rolling_windows_predict_every_token_once(length):
    tokens = list(range(10, 10 + length))
    whole = [0, *tokens]
    predicted = []
    for context, continuation in rolling_pairs(tokens, 0, 4):
        predicted += continuation
        end = tokens.index(continuation[-1]) + 1
        # As much context as there is, and as fits: the model reads all but the last token, four at most.
        read = [*context, *continuation][:-1]
        assert read == whole[:end][-4:]
        assert len(continuation) <= 4
    assert predicted == tokens


def test_spaces_before_a_continuation_belong_to_it(model, harness):
    ids = Tokenizer()
    found = harness.loglikelihood(requests(("ab ", "cd"), ("ab", " cd"), ("", "cd"), ("<s>ab", " cd")))
    context, rest = ids("ab")["input_ids"], ids(" cd", add_special_tokens=False)["input_ids"]
    expected = brute_force(model, context, rest)
    empty = brute_force(model, [0], ids("cd", add_special_tokens=False)["input_ids"])
    same(found, [expected, expected, empty, expected])


def test_a_rolling_loglikelihood_is_the_sum_over_the_text(model, harness):
    text = "the cat sat on a mat."
    ids = Tokenizer()(text)["input_ids"]
    # This tokenizer's BOS is predicted, too, from one before it: so the harness's own models do it.
    (found,) = harness.loglikelihood_rolling(requests((text,)))
    assert found == pytest.approx(brute_force(model, [0], ids)[0], rel=2e-5)


def test_greedy_continuations_are_those_of_generate(model, harness):
    texts, ids = ("once", "when", "a cat"), Tokenizer()
    settings = {"until": [], "max_gen_toks": 12}
    found = harness.generate_until(requests(*((text, settings) for text in texts)))
    for text, continued in zip(texts, found, strict=True):
        tokens = generation.generate(model, np.asarray([ids(text)["input_ids"]]), max_new_tokens=12)[0]
        assert continued == ids.decode(tokens.tolist(), True)
    # What begins at a stop is cut off.
    stop = found[0][5:7]
    (cut,) = harness.generate_until(requests(("once", settings | {"until": [stop, "?"]})))
    assert cut == found[0][: found[0].index(stop)]
    with pytest.raises(TwlaError, match=r"generation setting top_p = 0\.5 is not known"):
        harness.generate_until(requests(("once", {"do_sample": True, "top_p": 0.5})))


def test_answers_are_those_of_the_harness_with_transformers(stories_model):
    """stories260K in float32; `goldens/make_harness.py` kept what the harness's own model of it says."""
    golden = json.loads((Path(__file__).parents[1] / "goldens" / "harness.json").read_text(encoding="utf-8"))
    model, tokenizer = loading.load(stories_model)
    harness = HarnessModel(model, tokenizer, batch_tokens=512, progress=False)
    for name, method in (("loglikelihood", harness.loglikelihood), ("generate", harness.generate_until)):
        rows = golden[name]
        found = method(requests(*(row[:2] for row in rows)))
        if name == "generate":
            assert found == [text for _, _, text in rows]
        else:
            same(found, [row[2:] for row in rows])
    texts, values = zip(*golden["rolling"], strict=True)
    found = harness.loglikelihood_rolling(requests(*((text,) for text in texts)))
    np.testing.assert_allclose(found, values, rtol=2e-5)
