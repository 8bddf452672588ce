"""The demonstration scores the original once, and ends with what every model writes."""

from pathlib import Path

import numpy as np
import pytest

from twla_jax.inference import execution
from twla_jax.jobs import continuations, demonstrate, loading, quantize_model
from twla_jax.recipe import load_recipe
from twla_jax.text import corpora

BITS = {"demo-two-planes": 3.6, "demo": 1.9}


@pytest.fixture
def known():
    """The `evaluation` of a report."""
    text = corpora.load_corpus("pydoc", "evaluation").describe()
    return {
        **text,
        "windows": 2,
        "seq_len": 8,
        "tokens": 16,
        "perplexity": {"full": 9.0, "A16": 10.0, "A4": 11.0},
    }


def test_figures_of_the_original_are_taken_where_text_and_windows_are_the_same(known):
    text, tokens = corpora.load_corpus("pydoc", "evaluation"), np.zeros((2, 8), np.int32)
    figures = quantize_model._known_figures
    found = figures(known, text, tokens)
    assert (found["perplexity"], found["windows"], found["tokens"]) == (9.0, 2, 16)
    assert figures(None, text, tokens) is None
    assert figures(known, text, tokens[:1]) is None
    assert figures(known, corpora.load_corpus("notes", "evaluation"), tokens) is None


def test_the_second_model_is_told_of_the_first_and_all_write_last(known, monkeypatch):
    told = []

    class Loaded(str):
        """A model without sites."""

        sites = ()

    def quantize(model, out, recipe, **options):
        told.append((options["full_precision"], options["rotations"]))
        return {
            "evaluation": known,
            "size": {"bits_per_weight_linear": BITS[recipe.name]},
            "seconds": {"all": 7.0},
        }

    monkeypatch.setattr(quantize_model, "quantize_to_folder", quantize)
    monkeypatch.setattr(quantize_model, "format_report", lambda report, out: f"report of {out}")
    monkeypatch.setattr(loading, "load", lambda path: (Loaded(path), "tokenizer"))
    monkeypatch.setattr(execution, "for_inference", lambda model, kernels: (model, kernels))
    rows = [{"model": name, "temperature": 0.0, "text": "some words"} for name in ("one", "other")]
    asked = []
    monkeypatch.setattr(
        continuations, "continue_prompt", lambda models, tokenizer, prompt: asked.append(models) or rows
    )
    result = demonstrate.demonstrate({Path(name): load_recipe(name) for name in BITS})
    assert told == [(None, None), (known, {})]
    assert list(asked[0].values()) == ["smollm2", *BITS]
    table, prompt, text = demonstrate.format_demonstration(result).split("\n\n")[2:]
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["original", "16", "9.00"],
        ["demo-two-planes", "3.60", "10.00", "11.00", "7"],
        ["demo", "1.90", "10.00", "11.00", "7"],
    ]
    assert prompt == f'"{result["prompt"]} …"'
    assert text.splitlines()[-1] == "    … some words"


def test_rotations_are_shared_by_recipes_that_fit_them_to_the_weights_alone_and_alike():
    one, other = map(load_recipe, BITS)
    assert demonstrate._fits_same_rotations(one, other)
    for change in ({"seed": 1}, {"steps": 1}, False):
        assert not demonstrate._fits_same_rotations(one, other.updated({"rotation": change}))
    aware = [recipe.updated({"rotation": {"range_weight": 1.0}}) for recipe in (one, other)]
    assert not demonstrate._fits_same_rotations(*aware)
