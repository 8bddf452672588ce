"""Tokenizers from GGUF metadata, saved and loaded without a network."""

import gguf
import pytest

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
    with pytest.raises(TwlaError, match=r"its tokenizer cannot be read .*bert"):
        load_tokenizer(unknown)


def test_wikitext2_has_the_published_number_of_windows(smollm2, data):
    text = (data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    tokens = load_tokenizer(smollm2)(text, verbose=False)["input_ids"]
    assert len(tokens) // 2048 == 148
