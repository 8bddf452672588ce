"""Model folders that were once read wrongly, with what transformers 5.24 computes from them; and a fuzzer's inputs."""

import re
import shutil

import jax
import numpy as np
import pytest

from twla_jax import generate
from twla_jax.cli import main
from twla_jax.errors import TwlaError
from twla_jax.models.io.readers import load_model, read_config
from twla_jax.text import corpora

forward = jax.jit(lambda model, tokens: model(tokens))


@pytest.mark.parametrize("name", ["llama-params-and-scaling", "file-tied-extra-head", "x-qwen2-v5-plus-yarn"])
def test_logits_are_those_of_transformers(name, cases):
    expected = np.load(cases / name / "reference_logits.npy")
    logits = forward(load_model(cases / name), np.load(cases / name / "tokens.npy"))
    assert np.abs(np.asarray(logits) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_generation_stops_at_an_end_token_of_the_generation_settings(cases):
    prompt = np.load(cases / "g-eos" / "expected.npz")["p"]
    model = load_model(cases / "g-eos")
    assert set(model.config.eos_token_ids) == {2, 113}
    tokens = generate(model, np.atleast_2d(prompt), max_new_tokens=20)[0]
    assert tokens[1] == 113
    assert not set(tokens[2:].tolist()) - {113}  # nothing of its own after the end


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("fuzz_config_ZeroDivisionError_config.py_99.bin", "config.json"),
        ("fuzz_config_AttributeError_config.py_154.bin", "config.json"),
        ("fuzz_config_IndexError_config.py_191.bin", "config.json"),
        ("fuzz_config_out_of_memory.bin", "config.json"),
        ("fuzz_gguf_ZeroDivisionError_gguf.py_77.bin", "model.gguf"),
        ("fuzz_index_TypeError_huggingface.py_74.bin", "model.safetensors.index.json"),
    ],
)
def test_what_a_fuzzer_found_is_one_line(file, name, cases, golden, tmp_path):
    golden("llama").write(tmp_path)
    shutil.copyfile(cases / "fuzz" / file, tmp_path / name)
    read, path = (load_model, tmp_path) if name.endswith("index.json") else (read_config, tmp_path)
    with pytest.raises(TwlaError) as error:
        read(path / name if name.endswith(".gguf") else path)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert len(str(error.value).splitlines()) == 1


def test_a_gguf_scaling_of_the_older_name_is_read(cases):
    expected = np.load(cases / "gguf" / "gref_scale-linear-old.gguf.npy")
    logits = np.asarray(
        forward(load_model(cases / "gguf" / "scale-linear-old.gguf"), np.load(cases / "gguf" / "tokens.npy"))
    )
    assert np.sqrt(np.mean((logits - expected) ** 2)) <= 1e-4 * expected.std()


def test_a_gguf_window_of_zero_is_none(cases):
    assert read_config(cases / "gguf" / "window0-llama.gguf").sliding_window is None


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("bom.jsonl", " = Homarus gammarus = \n\n"),
        ("bom.txt", " \n = Homarus gammarus = "),
        ("ok.JSONL", " = Homarus gammarus = \n\n"),
        ("u2028.jsonl", " = Homarus gammarus = \u2028next line\x85more\n\n"),
        ("messages.jsonl", "User:  = Homarus gammarus = "),
        ("content.jsonl", " = Homarus gammarus = "),
        ("list.jsonl", 'list.jsonl, line 1: the field "text" is a list'),
        ("null.jsonl", 'null.jsonl, line 1: the field "text" is null'),
        ("surrogate.jsonl", 'surrogate.jsonl, line 1: the field "text" holds half a surrogate pair'),
    ],
)
def test_texts_are_read_as_their_kind_means_them_or_refused(name, begin, cases):
    path = cases / "text" / name
    if begin.startswith(name):
        with pytest.raises(TwlaError, match=re.escape(begin)):
            corpora.load_corpus(path, "calibration")
    else:
        assert corpora.load_corpus(path, "calibration").text.startswith(begin)


@pytest.mark.parametrize(
    "option", [("--batch-size", "-1"), ("--batch-size", "0"), ("--max-windows", "-1"), ("--max-windows", "0")]
)
def test_no_perplexity_comes_from_nothing(option, cases, capsys):
    folder = cases / "eval-batch-size"
    arguments = [
        "eval",
        str(folder / "model"),
        "--corpus",
        str(folder / "ok.txt"),
        "--seq-len",
        "128",
        *option,
    ]
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert option[0] in printed.err
