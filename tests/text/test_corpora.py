"""Calibration and evaluation text never meet, and windows can be drawn again."""

import hashlib
import json

import numpy as np
import pytest

from twla_jax.errors import TwlaError
from twla_jax.recipe import CalibrationSettings
from twla_jax.text import corpora, named
from twla_jax.text.windows import calibration_windows, sample_windows


class Letters:
    """A tokenizer whose ids are code points."""

    def __call__(self, text, verbose):
        return {"input_ids": [ord(letter) for letter in text]}


def paragraphs(corpus):
    flat = {" ".join(paragraph.split()) for paragraph in corpus.text.split("\n\n")}
    return {paragraph for paragraph in flat if len(paragraph) >= 80}


@pytest.mark.parametrize("name", ["pydoc", "wikitext2", "c4"])
def test_calibration_and_evaluation_share_no_paragraph(data, name):
    seen, unseen = (corpora.load_corpus(name, split) for split in ("calibration", "evaluation"))
    assert min(len(seen.text), len(unseen.text)) > 100_000
    assert not paragraphs(seen) & paragraphs(unseen)
    assert seen.sha256 != unseen.sha256


def test_wikitext2_is_the_raw_file(data):
    corpus = corpora.load_corpus("wikitext2", "evaluation")
    assert corpus.sha256 == corpora.WIKITEXT2_TEST_SHA256
    assert corpus.text.encode() == (data / "wikitext2" / "wiki.test.raw").read_bytes()


def test_published_rows_rebuild_the_raw_file(data, monkeypatch):
    raw = (data / "wikitext2" / "wiki.valid.raw").read_bytes().decode()
    lines = raw.splitlines(keepends=True)
    monkeypatch.delenv("TWLA_DATA")
    monkeypatch.setattr(named, "online", lambda *_, **__: (line if line.strip() else "" for line in lines))
    assert corpora.load_corpus("wikitext2", "calibration").text == raw


def test_the_test_split_is_refused_for_calibration_under_any_name(data):
    with pytest.raises(TwlaError, match="test split"):
        corpora.load_corpus(data / "wikitext2" / "wiki.test.raw", "calibration")


def test_a_corpus_marked_for_evaluation_never_becomes_windows():
    corpus = corpora.load_corpus("pydoc", "evaluation")
    with pytest.raises(TwlaError, match="marked for evaluation"):
        calibration_windows(corpus, Letters(), 2**21, CalibrationSettings(windows=1, seq_len=8))


def test_user_files_folders_and_mixes(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("two", "three")))
    load = corpora.load_corpus
    assert load(tmp_path / "a.txt", "calibration").text == "one\n"
    assert load(tmp_path / "b.jsonl", "evaluation").text == "two\n\nthree"
    assert load(tmp_path, "calibration").text == "one\n\n\ntwo\n\nthree"
    mix = load(f"{tmp_path / 'a.txt'}+{tmp_path / 'b.jsonl'}", "calibration")
    assert mix.text == "one\n\n\ntwo\n\nthree"
    assert mix.sha256 == hashlib.sha256(mix.text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2"),
        ("a.jsonl", b"[1", "line 1"),
        ("a.csv", None, "neither a file, a folder nor one of: pydoc, wikitext2"),
    ],
)
def test_unusable_files_are_named(tmp_path, file, content, message):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TwlaError, match=message) as caught:
        corpora.load_corpus(path, "calibration")
    assert str(path) in str(caught.value)


def test_without_data_and_network_the_way_out_is_told(monkeypatch):
    monkeypatch.delenv("TWLA_DATA", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TwlaError, match="'wikitext2' needs the folder TWLA_DATA or the package `datasets`"):
        corpora.load_corpus("wikitext2", "evaluation")


def test_windows_are_contiguous_and_drawn_again_from_the_same_seed():
    tokens = np.arange(1000, dtype=np.int32)
    windows = sample_windows(tokens, 5, 100, seed=3)
    assert windows.shape == (5, 100)
    assert windows.dtype == np.int32
    assert (np.diff(windows) == 1).all()
    np.testing.assert_array_equal(windows, sample_windows(tokens, 5, 100, seed=3))
    assert not np.array_equal(windows, sample_windows(tokens, 5, 100, seed=4))


def test_a_corpus_of_one_window_has_that_window_and_a_shorter_one_is_refused():
    tokens = np.arange(16, dtype=np.int32)
    np.testing.assert_array_equal(sample_windows(tokens, 2, 16, seed=0), [tokens, tokens])
    with pytest.raises(TwlaError, match="16 tokens, fewer than one window of 17"):
        sample_windows(tokens, 2, 17, seed=0)


def test_an_id_outside_the_vocabulary_is_refused():
    corpus = corpora.Corpus(name="mine", split="calibration", text="aé", source="here")
    assert corpora.tokenize(corpus, Letters(), 256).tolist() == [97, 233]
    with pytest.raises(TwlaError, match="token id 233, but the model's vocabulary ends at 127"):
        corpora.tokenize(corpus, Letters(), 128)
