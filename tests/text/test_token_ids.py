"""Windows begin with BOS where the tokenizer puts it before a text, and nowhere else."""

import numpy as np
import pytest

from twla_jax.evaluation.scoring import cut_windows
from twla_jax.recipe import CalibrationSettings
from twla_jax.text.corpora import Corpus, first_windows, tokenize
from twla_jax.text.token_ids import token_ids
from twla_jax.text.windows import calibration_windows, held_out_windows, sample_windows

BOS = 1


class Letters:
    """A token a letter, with or without BOS before the text."""

    def __init__(self, adds_bos, bos_token_id=BOS):
        self.adds_bos, self.bos_token_id = adds_bos, bos_token_id

    def __call__(self, text, **_):
        return {"input_ids": [BOS] * self.adds_bos + [ord(letter) for letter in text]}


def corpus(text):
    return Corpus(name="letters", split="calibration", source="here", text=text)


@pytest.fixture
def text():
    return "".join(chr(97 + i % 26) for i in range(100))


def test_a_window_is_bos_and_one_token_less_of_the_text(text):
    tokens = tokenize(corpus(text), Letters(True), 256)
    assert tokens.tolist() == [ord(letter) for letter in text]
    windows = cut_windows(tokens, 11)
    assert windows.shape == (10, 11)
    assert (windows[:, 0] == BOS).all()
    assert windows[:, 1:].ravel().tolist() == tokens.tolist()
    assert windows.dtype == np.int32
    drawn = sample_windows(tokens, 5, 11, seed=0)
    held_out, shared = held_out_windows(
        tokens, [CalibrationSettings(windows=5, seq_len=11, seed=0)], 2, 11, seed=2
    )
    for window in (*drawn, *held_out):
        assert window[0] == BOS
        assert "".join(map(chr, window[1:])) in text
    assert 0 <= shared <= 1
    settings = CalibrationSettings(windows=3, seq_len=8)
    np.testing.assert_array_equal(first_windows(corpus(text), Letters(True), 256, 3, 11), windows[:3])
    assert (calibration_windows(corpus(text), Letters(True), 256, settings)[:, 0] == BOS).all()


@pytest.mark.parametrize("tokenizer", [Letters(False), Letters(False, None), Letters(True, None)])
def test_without_such_a_tokenizer_windows_are_the_text_alone(tokenizer, text):
    tokens = tokenize(corpus(text), tokenizer, 256)
    expected = tokenizer(text)["input_ids"]
    assert tokens.tolist() == expected
    assert cut_windows(tokens, 10).ravel().tolist() == expected[:100]
    assert cut_windows(np.asarray(expected), 10).ravel().tolist() == expected[:100]


def test_parts_of_a_text_still_know_its_bos():
    tokens = token_ids(np.arange(10), 0)
    assert tokens[2:].bos == 0
    assert cut_windows(tokens[:4], 3).tolist() == [[0, 1, 2], [0, 3, 4]]
