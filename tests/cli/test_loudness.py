"""How much a command says: figures and text on stdout whatever happens, all else as `-q` and `-v` ask."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest

from twla_jax import progress
from twla_jax.cli import main, use
from twla_jax.inference import text_generation


@pytest.fixture
def generation(monkeypatch):
    """A command that tells how it goes, logs and warns as others do, and continues a prompt by its own words."""
    logger = logging.getLogger("twla_jax.somewhere")

    def stream(decoder, tokenizer, prompt, **_):
        logger.info("a detail")
        logger.warning("a warning")
        with progress.Bar(total=1, desc="a bar") as bar:
            bar.update()
        yield 1, prompt

    model = SimpleNamespace(dtype="float32")
    monkeypatch.setattr(use, "load_for_use", lambda *_, **__: (model, None, "what runs it"))
    monkeypatch.setattr(text_generation, "stream_text", stream)


def run(capsys, *arguments):
    main.main(list(arguments))
    return capsys.readouterr()


@pytest.mark.parametrize("flag", ["", "-q", "--quiet", "-v", "--verbose"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_flags_stand_anywhere_and_ask_for_less_or_more(generation, capsys, flag, place):
    arguments = ["generate", "m", "words", "--json"]
    arguments[place:place] = [flag] if flag else []
    printed = run(capsys, *arguments)
    assert json.loads(printed.out)["text"] == "words"
    said = {each for each in ("what runs it", "a bar", "a detail") if each in printed.err}
    assert (
        said
        == {"": {"what runs it", "a bar"}, "q": set(), "v": {"what runs it", "a bar", "a detail"}}[
            flag.lstrip("-")[:1]
        ]
    )
    assert logging.getLogger("twla_jax").handlers == []


def test_a_quiet_command_still_warns(generation, capsys, monkeypatch):
    # Where no handler is set, as outside tests, Python writes warnings to stderr in the same way.
    monkeypatch.setattr(logging.getLogger("twla_jax"), "handlers", [logging.StreamHandler(sys.stderr)])
    assert run(capsys, "-q", "generate", "m", "words").err == "a warning\n"


def test_less_and_more_at_once_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["generate", "-q", "m", "words", "-v"])
    assert stop.value.code == 2
    assert "leave one out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["a b"], "a b"),
        (["None"], "None"),
        (["--prompt", "None"], "None"),
        (["--prompt", "-q"], "-q"),
        ([""], ""),
    ],
)
def test_the_prompt_stands_behind_the_model_or_in_an_option(generation, capsys, arguments, prompt):
    assert json.loads(run(capsys, "generate", "m", *arguments, "--json").out)["prompt"] == prompt


@pytest.mark.parametrize(
    ("arguments", "message"), [(["a", "--prompt", "b"], "given twice"), ([], "there is no prompt")]
)
def test_one_prompt_is_needed(generation, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main.main(["generate", "m", *arguments])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (1, "")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
