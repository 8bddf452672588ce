"""Talking on the command line: history, commands, interrupts; and prompts that go through the chat template."""

import io
import json
import os
import signal
import sys

import pytest

from twla_jax.cli import chat as command
from twla_jax.cli import interrupts, main
from twla_jax.inference import text_generation
from twla_jax.jobs import loading
from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint
from twla_jax.text import chat

from helpers.chat_tokenizer import chat_tokenizer

GREEDY = ["--temperature", "0", "--max-new-tokens", "5"]


@pytest.fixture
def folder(tiny_ternary, tmp_path):
    """A quantised model with a chat template and settings of its own for sampling."""
    settings = {
        "generation_config.json": b'{"temperature": 0.3, "top_k": 7, "top_p": "x", "eos_token_id": 1}'
    }
    checkpoint.save(tiny_ternary, chat_tokenizer(), tmp_path / "out", Recipe(), {}, extra=settings)
    return tmp_path / "out"


def say(monkeypatch, capsys, folder, *lines, options=GREEDY):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    main.main(["chat", str(folder), *options])
    return capsys.readouterr()


def test_answers_know_what_was_said_and_commands_act(folder, monkeypatch, capsys):
    printed = say(monkeypatch, capsys, folder, "w1 w2", "", "w3", "/reset", "w3", "/what", "/exit", "w1")
    answers = printed.out.splitlines()
    assert len(answers) == 3
    model, tokenizer = loading.load(folder)
    history = []
    for said, answer in (("w1 w2", answers[0]), ("w3", answers[1])):
        history.append({"role": "user", "content": said})
        pairs = text_generation.stream_text(
            model, tokenizer, chat.encode_chat(tokenizer, history), max_new_tokens=5, eos_token_ids=(1, 3)
        )
        assert answer == "".join(piece for _, piece in pairs)
        history.append({"role": "assistant", "content": answer})
    assert answers[1] != answers[2]
    assert "(forgotten)" in printed.err
    assert "(/what is no command; /reset forgets" in printed.err


def test_a_prompt_for_a_chat_is_what_a_conversation_makes_of_it(folder, monkeypatch, capsys):
    system = ["--system", "w9"]
    answer = say(monkeypatch, capsys, folder, "w1", options=[*GREEDY, *system]).out
    main.main(["generate", str(folder), "--prompt", "w1", "--chat", *system, *GREEDY, "--json"])
    assert json.loads(capsys.readouterr().out)["text"] == answer.rstrip("\n")
    with pytest.raises(SystemExit):
        main.main(["generate", str(folder), "--prompt", "w1", *system])
    assert "--system is for --chat" in capsys.readouterr().err


def test_settings_that_are_not_given_are_those_that_the_model_suggests(folder, monkeypatch, capsys):
    assert loading.suggested_sampling(folder) == {"temperature": 0.3, "top_k": 7}
    seen = []
    monkeypatch.setattr(command, "talk", lambda conversation, read: seen.append(conversation._sampling))
    say(monkeypatch, capsys, folder, options=["--top-k", "9", "--seed", "4"])
    found = seen[0]
    assert (found.temperature, found.top_k, found.top_p, found.seed) == (0.3, 9, 1.0, 4)


def test_options_that_are_out_of_range_are_named(folder, capsys):
    for option, value in (("--top-p", "1.5"), ("--top-k", "-1"), ("--stop", "")):
        with pytest.raises(SystemExit):
            main.main(["generate", str(folder), "--prompt", "w1", option, value])
        printed = capsys.readouterr().err.splitlines()[-1]
        assert printed.startswith("twla: error: ")
        assert option.lstrip("-") in printed


def test_bytes_that_are_no_text_end_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"w1 \xff w2\n/exit\n"), encoding="utf-8"))
    main.main(["chat", str(folder), *GREEDY])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_an_interrupt_stops_an_answer_or_a_line_and_not_the_session(capsys):
    class Answering:
        """Answers with one word, then waits for Ctrl-C."""

        def __init__(self):
            self.heard = []

        def answer(self, line):
            self.heard.append(line)
            yield "begun"
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()

    def read():
        line = lines.pop(0)
        if line == "^C":
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        return line

    lines, talking = ["one", "^C", "two", None], Answering()
    with interrupts.heard(), interrupts.raised():  # the outer one would raise again at its end
        command.talk(talking, read)
    assert talking.heard == ["one", "two"]
    printed = capsys.readouterr()
    assert printed.out == "begun\nbegun\n"
    assert printed.err.count("(stopped)") == 2
    assert "/reset forgets" in printed.err
