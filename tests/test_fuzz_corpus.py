"""What the fuzz script begins with, and what it once found, is read or refused in one line."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs():
    for path in sorted((PATH.parent / "fuzz_corpus").glob("*/*")):
        # Makes a quantised model first.
        marks = [pytest.mark.slow] if path.parent.name == "manifest" else []
        yield pytest.param(path.parent.name, path.name, marks=marks)


@pytest.mark.parametrize(("target", "name"), list(inputs()))
def test_no_input_of_the_corpus_ends_in_another_error(fuzz, target, name):
    fuzz.run(target, (fuzz.CORPUS / target / name).read_bytes())


def test_every_target_has_inputs_and_one_that_is_read(fuzz):
    assert {path.name for path in fuzz.CORPUS.iterdir()} == fuzz.TARGETS.keys()
    valid = {"config": "llama", "index": None, "manifest": None, "safetensors": "llama", "gguf": "llama"}
    valid |= {"tokenizer": "words", "recipe": "plain", "text": "plain"}
    for target, name in valid.items():
        if name is not None:
            fuzz.TARGETS[target]((fuzz.CORPUS / target / name).read_bytes())  # raises what is refused


def test_an_error_that_is_not_the_librarys_own_is_found(fuzz, monkeypatch):
    def fails(data):
        raise KeyError(data)

    monkeypatch.setitem(fuzz.TARGETS, "text", fails)
    with pytest.raises(KeyError):
        fuzz.run("text", b"")
