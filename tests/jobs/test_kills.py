"""Commands that are killed: what they write is as before or whole, and the next run ends as if nothing was."""

import os

import pytest

from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint

import kill
from helpers.chat_tokenizer import chat_tokenizer

MANY = "TWLA_KILLS"  # says how often each command is attacked
LONG = [*("quantize", "refine", "allocate", "compare", "report", "generate", "chat", "serve")]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "gguf"])  # a folder and a file
def test_a_killed_export_leaves_nothing_in_its_place(tiny_ternary, tmp_path, format):
    checkpoint.save(
        tiny_ternary, None if format == "gguf" else chat_tokenizer(), tmp_path / "out", Recipe(), {}
    )
    (tmp_path / "work").mkdir()
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    case = kill.make_case(f"export-{format}", nothing, nothing, tmp_path / "work", tmp_path / "out")
    _, wrong = kill.attacks(case, int(os.environ.get(MANY, 1)), int(os.environ.get(MANY, 0)))
    assert not wrong


@pytest.mark.slow
@pytest.mark.skipif(MANY not in os.environ, reason=f"takes minutes: {MANY} says how many attacks")
@pytest.mark.parametrize("command", LONG)
def test_a_killed_command_leaves_old_or_new_and_goes_on_to_the_same_bytes(
    command, stories_model, texts, tmp_path
):
    case = kill.make_case(command, stories_model, texts / "calibration.txt", tmp_path)
    _, wrong = kill.attacks(case, int(os.environ[MANY]), int(os.environ[MANY]))
    assert not wrong
