"""The mix of domains: each has as many windows as another, and none that is evaluated is calibrated on."""

import json
import shutil

import numpy as np
import pytest

from twla_jax.errors import TwlaError
from twla_jax.recipe import CalibrationSettings
from twla_jax.text import corpora, mix
from twla_jax.text.corpora import Corpus
from twla_jax.text.windows import calibration_windows, held_out_windows, sample_windows


class Letters:
    """A tokenizer whose ids are code points."""

    chat_template = None

    def __call__(self, text, verbose, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in text]}


class Chatting(Letters):
    """A tokenizer with a chat template."""

    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        return "".join(f"<{message['role'][0]}>{message['content']}" for message in messages)


def paragraphs(corpus):
    flat = {" ".join(paragraph.split()) for paragraph in corpus.text.split("\n\n")}
    return {paragraph for paragraph in flat if len(paragraph) >= 200}


@pytest.mark.parametrize("name", ["stdlib", "notes"])
def test_texts_of_the_machine_share_no_paragraph_between_purposes(name):
    seen, unseen = (corpora.load_corpus(name, split) for split in ("calibration", "evaluation"))
    assert min(len(seen.text), len(unseen.text)) > 100_000
    shared = paragraphs(seen) & paragraphs(unseen)
    assert len(shared) <= 0.02 * len(paragraphs(unseen))  # a licence's terms recur


def test_without_data_the_mix_is_of_what_the_machine_carries(monkeypatch):
    monkeypatch.delenv("TWLA_DATA", raising=False)
    seen = corpora.load_corpus("mix", "calibration")
    assert [part.name for part in seen.parts][:3] == ["pydoc", "stdlib", "notes"]
    assert seen.describe()["domains"] == [part.name for part in seen.parts]
    # A part is shuffled: what evaluates keeps its order.
    assert seen.sha256 == corpora.load_corpus("mix", "calibration").sha256


def domain_files(folder, name, records):
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text("".join(lines))


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A folder `TWLA_DATA` with two domains and two languages for each purpose."""
    for split, mark in (("train", "t"), ("valid", "v")):
        folder = tmp_path / "domains" / split
        domain_files(folder, "code", [{"text": f"{mark} code {i} " * 9} for i in range(30)])
        chats = [{"messages": [{"role": "user", "content": f"{mark}{i}"}]} for i in range(9)]
        domain_files(folder, "chat", chats)
        texts = [{"text": mark * 40, "lang": "de"}, {"text": mark * 50, "lang": "zh"}]
        domain_files(folder, "languages", texts)
    monkeypatch.setenv("TWLA_DATA", str(tmp_path))
    return tmp_path


def test_domains_come_from_the_folder_where_it_has_them(own_data):
    for split, mark in (("calibration", "t"), ("evaluation", "v")):
        parts = {part.name: part for part in corpora.load_corpus("mix", split).parts}
        assert parts.keys() == {"chat", "code", "german", "chinese"}
        assert parts["chinese"].text == mark * 50
        assert f"{mark} code 7" in parts["code"].text
        assert corpora.load_corpus("german", split).text == mark * 40
    listed = corpora.load_domains(own_data / "domains" / "valid")
    assert listed.keys() == {"chat", "code", "german", "chinese"}
    assert corpora.load_domains("mix")["german"].text == listed["german"].text
    assert corpora.load_domains("code,german").keys() == {"code", "german"}
    with pytest.raises(TwlaError, match="'french' needs the folder TWLA_DATA"):
        corpora.load_corpus("french", "evaluation")


def test_an_archive_stands_for_the_unpacked_folder(own_data):
    unpacked = corpora.load_corpus("mix", "calibration").sha256
    folder = own_data / "domains"
    shutil.make_archive(str(folder / "train"), "xztar", folder, "train")
    shutil.rmtree(folder / "train")
    assert corpora.load_corpus("mix", "calibration").sha256 == unpacked


def test_evaluation_texts_are_refused_for_calibration_under_any_path(own_data):
    folder = own_data / "domains" / "valid"
    for path in (folder, folder.parent, folder / "code.jsonl", folder / ".." / "valid" / "chat.jsonl"):
        with pytest.raises(TwlaError, match="is an evaluation text"):
            corpora.load_corpus(path, "calibration")
    with pytest.raises(TwlaError, match="is an evaluation text"):
        corpora.load_domains(folder, "calibration")


def test_no_text_of_a_folder_hides_another_of_its_name(tmp_path):
    domain_files(tmp_path, "a", [{"text": "one"}])
    domain_files(tmp_path, "languages", [{"text": "four", "lang": "de"}])
    domain_files(tmp_path / "v1.0", "languages", [{"text": "five", "lang": "de"}])
    for name, text in (
        ("a.txt", "two"),
        ("a.b.txt", "three"),
        ("v1.0/a.txt", "six"),
        ("v1.0/b.txt", "seven"),
    ):
        (tmp_path / name).write_text(text)
    texts = {name: corpus.text for name, corpus in corpora.load_domains(tmp_path).items()}
    assert sorted(texts.values()) == sorted(["one", "two", "three", "four", "five", "six", "seven"])
    assert texts["v1.0/a"] == "six"
    assert texts["v1.0/languages.jsonl:german"] == "five"


def test_chats_are_rendered_by_the_tokenizer_that_can(own_data):
    chat = corpora.load_corpus("chat", "evaluation")
    plain, rendered = (
        "".join(map(chr, corpora.tokenize(chat, tokenizer(), 2**21))) for tokenizer in (Letters, Chatting)
    )
    assert plain.startswith("User: v0\n\nUser: v1")
    assert rendered.startswith("<u>v0<u>v1")


def test_long_documents_are_cut_at_ends_of_lines_and_nothing_is_lost():
    lines = [f"{i:06} {'x' * 90}\n" for i in range(1000)]
    text = mix.shuffled(["".join(lines)], "here")
    pieces = text.text.split("\n\n")
    assert len(pieces) == 8
    assert sorted(filter(None, "\n".join(pieces).split("\n"))) == [line[:-1] for line in lines]
    assert not text.text.startswith(lines[0])


def mixture(lengths):
    """A mix whose domains are a letter each."""
    parts = tuple(
        Corpus(name=letter, split="calibration", text=letter * length, source="here")
        for letter, length in zip("abc", lengths, strict=False)
    )
    text = "".join(part.text for part in parts)
    return Corpus(name="mixture", split="calibration", text=text, source="here", parts=parts)


def test_no_domain_drowns_another():
    settings = CalibrationSettings(windows=8, seq_len=10)
    windows = calibration_windows(mixture((20, 5000, 300)), Letters(), 128, settings)
    assert ["".join(map(chr, row)) for row in windows] == [letter * 10 for letter in "abcabcab"]
    np.testing.assert_array_equal(
        windows, calibration_windows(mixture((20, 5000, 300)), Letters(), 128, settings)
    )
    with pytest.raises(TwlaError, match="9 tokens, fewer than one window of 10"):
        calibration_windows(mixture((9, 5000)), Letters(), 128, settings)


def test_held_out_windows_of_a_mix_avoid_those_of_their_own_domain():
    tokens = (np.arange(1000, dtype=np.int32), np.arange(1000, 3000, dtype=np.int32))
    drawn = [CalibrationSettings(windows=9, seq_len=50, seed=seed) for seed in (0, 1)]
    seen = {
        token for settings in drawn for token in sample_windows(tokens, 9, 50, settings.seed).ravel().tolist()
    }
    windows, shared = held_out_windows(tokens, drawn, 5, 30, seed=2)
    assert shared == 0
    assert not seen & set(windows.ravel().tolist())
    assert (windows[:, 0] < 1000).tolist() == [True, False, True, False, True]
