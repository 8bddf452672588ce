"""Tokenizers from GGUF metadata, saved and loaded without a network."""

import json
import os
import subprocess
import sys
import tarfile

import gguf
import pytest
from tokenizers import Tokenizer

from twla_jax.errors import TwlaError
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.io.tokenizer import load_tokenizer, save_tokenizer, tokenizer_from_gguf

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


def write(path, *, tokens, kinds, merges=None, model="gpt2", **settings):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges is not None:
        writer.add_token_merges(merges)
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def byte_level(tmp_path):
    pieces = ["<|im_start|>", "<|im_end|>", *"abc1½ĠÂ", "ab", "11", "ĠÂ", "ĠÂ½"]
    return write(
        tmp_path / "model.gguf",
        tokens=pieces,
        kinds=[CONTROL, CONTROL] + [NORMAL] * (len(pieces) - 2),
        merges=["a b", "1 1", "Ġ Â"],
        tokenizer_pre="smollm",
        bos_token_id=0,
        eos_token_id=1,
        add_bos_token=False,
        chat_template=TEMPLATE,
    )


def test_a_byte_level_tokenizer_keeps_its_special_tokens_and_splits_digits(byte_level):
    tokenizer = load_tokenizer(byte_level)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>abc11<|im_end|>")["input_ids"])
    assert pieces == ["<|im_start|>", "ab", "c", "1", "1", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_a_saved_tokenizer_is_the_same_offline_chat_template_included(byte_level, tmp_path):
    tokenizer = tokenizer_from_gguf(GgufFile(byte_level))
    save_tokenizer(tokenizer, tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    text = "cab<|im_end|>11 ½"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == TEMPLATE
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_sentencepiece_files_begin_with_bos_unless_they_say_otherwise(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"]
    kinds = [gguf.TokenType.UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 5
    scores = [0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0]
    settings = {"tokens": pieces, "kinds": kinds, "model": "llama", "token_scores": scores, "bos_token_id": 1}
    tokenizer = load_tokenizer(write(tmp_path / "silent.gguf", **settings))
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab")["input_ids"])[0] == "<s>"
    tokenizer = load_tokenizer(write(tmp_path / "off.gguf", **settings, add_bos_token=False))
    assert "<s>" not in tokenizer.convert_ids_to_tokens(tokenizer("ab")["input_ids"])


def test_absent_and_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(TwlaError, match="no tokenizer is there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TwlaError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)
    unknown = write(tmp_path / "x.gguf", tokens=["a"], kinds=[NORMAL], model="bert")
    with pytest.raises(TwlaError, match=r"tokenizer cannot be read .*bert"):
        load_tokenizer(unknown)


def test_wikitext2_has_the_published_number_of_windows(smollm2, data):
    text = (data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    tokens = load_tokenizer(smollm2)(text, verbose=False)["input_ids"]
    assert len(tokens) // 2048 == 148


@pytest.fixture(scope="module")
def unpacked(cases, tmp_path_factory):
    """Vocabularies of several kinds, with the ids that tokenizers or sentencepiece give."""
    folder = tmp_path_factory.mktemp("tokens")
    for name in ("hf-tokens", "gguf-tokens"):
        with tarfile.open(cases / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


TEXTS = (
    "The year 2024 had 12345 words",
    "x = [\n        1, 2,\n   33 1234567]",
    "I'LL, DON'T they'll",
    " leading",
    "x =   22\n\n   33",
    " an unusualword",
    "naïve café 中文字",
    "",
)


@pytest.mark.parametrize(
    "name", ["spm-never-llama", "l3-gpt2class", "l3-qwen2model-llamafast", "spm-norm-llama", "zz-smollm2-hf"]
)
def test_a_tokenizer_file_is_used_as_it_is_whatever_class_is_named(name, unpacked, tmp_path):
    folder = unpacked / "hf-tokens" / name
    expected, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = expected.encode(text).ids
        assert tokenizer(text)["input_ids"] == ids
        assert again(text)["input_ids"] == ids


@pytest.mark.parametrize(
    "name", ["llama-bpe-noaddbos", "llama-bpe-ignoremerges", "refact", "deepseek-llm", "stablelm2", "viking"]
)
def test_a_gguf_vocabulary_splits_words_by_the_name_of_its_pre_tokenizer(name, unpacked):
    file = unpacked / "gguf-tokens" / f"{name}.gguf"
    expected, tokenizer = Tokenizer.from_file(str(file.with_suffix(".json"))), load_tokenizer(file)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == expected.encode(text).ids


def test_sentencepiece_vocabularies_put_a_space_in_front_unless_the_file_says_no(unpacked):
    file = GgufFile(unpacked / "gguf-tokens" / "spm_900_noprefix.gguf")
    tokenizer = tokenizer_from_gguf(file)
    assert not tokenizer.convert_ids_to_tokens(tokenizer("The year")["input_ids"][1:])[0].startswith("▁")
    assert tokenizer.decode(tokenizer("The year")["input_ids"][1:]) == "The year"
    wanted = json.loads((unpacked / "gguf-tokens" / "spm_want.json").read_text())
    del file.metadata["tokenizer.ggml.add_space_prefix"]
    tokenizer = tokenizer_from_gguf(file)
    for text, ids in zip(wanted["strings"], wanted["ids"], strict=True):
        if "s>" not in text:  # sentencepiece takes the names of its own marks for text
            assert tokenizer(text)["input_ids"] == ids


def test_an_unknown_pre_tokenizer_and_metadata_of_a_wrong_kind_are_refused(tmp_path, byte_level):
    file = GgufFile(byte_level)
    for key, value, message in (
        ("pre", "unheard-of", "pre-tokenizer 'unheard-of' is not known"),
        ("pre", 5, "tokenizer.ggml.pre is 5, not a text"),
        ("tokens", 3, "tokenizer.ggml.tokens is 3, not a list"),
        ("tokens", [1, 2], "tokenizer.ggml.tokens is a list of 2, not a list"),
        ("token_type", [1], "1 token_type for a vocabulary"),
        ("merges", ["ab"], "merge 'ab' is not a pair"),
        ("bos_token_id", "x", "tokenizer.ggml.bos_token_id is 'x', not an integer"),
        ("add_bos_token", 1, "tokenizer.ggml.add_bos_token is 1, not true or false"),
    ):
        kept = file.metadata[f"tokenizer.ggml.{key}"]
        file.metadata[f"tokenizer.ggml.{key}"] = value
        with pytest.raises(TwlaError) as error:
            tokenizer_from_gguf(file)
        assert str(error.value).startswith(f"{byte_level}: {message}")
        file.metadata[f"tokenizer.ggml.{key}"] = kept
    del file.metadata["tokenizer.ggml.merges"]
    for kind, key in (("gpt2", "merges"), ("llama", "scores")):
        file.metadata["tokenizer.ggml.model"] = kind
        with pytest.raises(TwlaError, match=rf"metadata 'tokenizer.ggml.{key}' is missing"):
            tokenizer_from_gguf(file)


def test_code_of_a_model_folder_never_runs_not_even_when_asked_to(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "tok.py").write_text(f"open({str(ran)!r}, 'w')\nclass T: pass\n")
    settings = {"auto_map": {"AutoTokenizer": ["tok.T", "tok.T"]}, "tokenizer_class": "T"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "tok.T"}})
    )
    code = (
        "import sys; from twla_jax.errors import TwlaError; from twla_jax.models.io.tokenizer import load_tokenizer\n"
        "try: load_tokenizer(sys.argv[1])\nexcept TwlaError as error: print(error)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        input="y\ny\n",
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert child.stdout.startswith(f"{tmp_path}: the tokenizer cannot be read")
    assert not ran.exists()


NFKC = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
FOLDED = {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": True}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bpe", {}),
        ("unigram", {}),
        ("unigram", FOLDED),
        ("unigram", {**NFKC, "byte_fallback": False}),
        ("unigram", {**NFKC, "add_dummy_prefix": False, "user_defined_symbols": "<|x|>,ab"}),
        ("bpe", {"user_defined_symbols": "<|x|>,ab"}),
        ("char", {}),
    ],
)
def test_a_sentencepiece_file_gives_its_own_ids_or_is_refused(kind, settings, cases, tmp_path):
    import sentencepiece

    corpus = cases / "eval-batch-size" / "ok.txt"
    plain = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type=kind,
        minloglevel=2,
        **{**plain, **settings},
    )
    if kind == "char" or (kind == "bpe" and settings):
        with pytest.raises(
            TwlaError, match=r"not converted exactly|neither of the BPE nor of the unigram kind"
        ):
            load_tokenizer(tmp_path)
        return
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in (*TEXTS, "<|x|> abab", " \n = \n  y", corpus.read_text()[:3000]):
        assert tokenizer(text)["input_ids"] == [model.bos_id(), *model.encode(text)]


def test_damaged_sentencepiece_files_are_one_line(cases, tmp_path):
    for content in (b"", b"\x0a\xff\xff\xff\xff\x0f", bytes(100), b"\x0a\x04\x0a\x02ab" * 3):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(TwlaError, match="the tokenizer cannot be read"):
            load_tokenizer(tmp_path)


def test_a_sentencepiece_file_asks_for_its_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TwlaError, match=r"needs sentencepiece: pip install 'twla-jax\[sentencepiece\]'"):
        load_tokenizer(tmp_path)


def test_tokenizer_files_that_cannot_be_opened_are_named_at_once(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(TwlaError, match=r"tokenizer\.json: not a regular file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(TwlaError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)
