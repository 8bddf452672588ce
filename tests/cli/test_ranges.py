"""Every number on the command line has a range, every value reaches its option, and all output is what it says."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import typing
from types import SimpleNamespace

import pytest
from jax.errors import JaxRuntimeError

from twla_jax import json_text
from twla_jax.cli import evaluate, failures, interrupts, main, options
from twla_jax.errors import TwlaError
from twla_jax.evaluation import domains
from twla_jax.jobs import loading
from twla_jax.limits import LIMITS, check_number
from twla_jax.models import config
from twla_jax.text import corpora
from twla_jax.version import __version__

REQUIRED = {
    "quantize": ["m", "out"],
    "allocate": ["out"],
    "eval": ["m"],
    "chat": ["m"],
    "serve": ["m"],
    "generate": ["m", "--prompt", "a"],
    "compare": ["m"],
}


def fails(capsys, *arguments):
    """The one line of a command that must fail, and its exit status."""
    with pytest.raises(SystemExit) as stop:
        main.main(list(arguments))
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("twla: error: ")]
    assert "unexpected" not in line
    return line, stop.value.code


def number_options():
    """Every option that takes one number, with the command it belongs to."""
    for command, function in main.COMMANDS.items():
        for name, parameter in inspect.signature(function).parameters.items():
            base = typing.get_args(parameter.annotation)[:1] or (parameter.annotation,)
            kinds = set(typing.get_args(base[0]) or base) - {type(None)}
            if kinds & {int, float}:
                yield command, f"--{name.replace('_', '-')}"


@pytest.mark.parametrize(("command", "option"), list(number_options()))
def test_no_number_is_taken_that_makes_no_sense(command, option, capsys):
    for value in ("-1", "nan", "inf", "1" + "0" * 30, "9" * 5000, "1.5.2", "", "None"):
        line, status = fails(capsys, command, *REQUIRED.get(command, []), option, value)
        assert status == 2
        assert option in line
        assert len(line) < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "m", "--batch-size", "0"], "--batch-size: '0' is not a whole number from 1 to 65536"),
        (["eval", "m", "--max-windows", "0"], "--max-windows: '0' is not a whole number"),
        (["eval", "m", "--seq-len", "1"], "--seq-len: '1' is not a whole number from 2"),
        (["generate", "m", "--prompt", "a", "--max-new-tokens", "2.5"], "'2.5' is not a whole number"),
        (["generate", "m", "--prompt", "a", "--seed", str(2**31)], "to 2147483647"),
        (["quantize", "m", "o", "--embedding-bits", "9"], "one of 2, 3, 4, 5, 6, 7, 8, 16"),
        (["bench", "--activation-bits", "16,5"], "--activation-bits 5: must be one of 16, 8, 6, 4, 2"),
        (["bench", "--batch", "1,-1"], "--batch -1: must be a whole number from 1"),
        (["allocate", "o", "--frontier", "4,nan"], "--frontier nan: must be a number from 1 to 16"),
        (["compare", "m", "--activation-bits", "3"], "--activation-bits 3: must be one of"),
        (["eval", "m", "--domains", ""], "a name is empty"),
        (["eval", "m", "--activation-bits", "5"], "Expected one of (2, 4, 6, 8, 16)"),
        (["eval", "m", "--kernels", "x"], "Expected one of (auto, off, on)"),
    ],
)
def test_the_range_is_told(arguments, message, capsys):
    assert message in fails(capsys, *arguments)[0]


@pytest.mark.parametrize("limit", LIMITS)
def test_python_callers_get_the_same_ranges(limit):
    low = LIMITS[limit].choices[0] if LIMITS[limit].choices else LIMITS[limit].low
    check_number(limit, low)
    for value in (-1, math.nan, 10**30, "1", None, True, low + 0.5j):
        with pytest.raises(TwlaError, match=f"mine .*: must be {LIMITS[limit].words[:5]}"):
            check_number(limit, value, called="mine")


@pytest.mark.parametrize("prompt", ["-x", "--", "--max", "-1", "- a list"])
def test_a_prompt_may_begin_with_a_dash(prompt, monkeypatch):
    seen = []

    def generate(model: options.Model, /, *, prompt: str, json: bool = False) -> None:
        seen.append((prompt, json))

    monkeypatch.setitem(main.COMMANDS, "generate", generate)
    main.main(["generate", "m", "--prompt", prompt, "--json"])
    assert seen == [(prompt, True)]


def test_an_option_is_not_taken_for_a_prompt(capsys):
    assert fails(capsys, "generate", "m", "--prompt", "--json") == (
        "twla: error: Missing value for argument '--prompt'. Expected 1 values.",
        2,
    )


def test_json_has_no_numbers_that_json_does_not_know():
    figures = {"nan": math.nan, "rows": [math.inf, (-math.inf, 1.5)], "count": 2, "text": "NaN"}
    text = json_text.dumps(figures)
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert loaded == {"nan": None, "rows": [None, [None, 1.5]], "count": 2, "text": "NaN"}
    with pytest.raises(TwlaError, match="JSON"):
        json_text.dumps({"a": object()})


def test_a_perplexity_that_is_no_number_is_an_error_by_text_and_against_an_original_too(monkeypatch, capsys):
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=1), dtype=None)
    monkeypatch.setattr(evaluate, "load_for_use", lambda *_, **__: (model, None, ""))
    monkeypatch.setattr(loading, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(config, "check_length", lambda *_: None)
    monkeypatch.setattr(corpora, "load_domains", lambda _: {})
    for key, named in (("perplexity", "m:"), ("original_perplexity", "o:")):
        row = {"name": "prose", "perplexity": 3.0, "original_perplexity": 2.0, key: math.nan}
        monkeypatch.setattr(domains, "evaluate_domains", lambda *_, row=row, **__: {"domains": [row]})
        line, status = fails(capsys, "eval", "m", "--domains", "d", "--against", "o")
        assert status == 1
        assert f"{named} its predictions on text 'prose' are not numbers (NaN)" in line


@pytest.mark.parametrize("plot", ["missing/x.png", ".", "x.doc"])
def test_a_figure_that_could_not_be_written_is_refused_before_the_work(plot, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["bench", "kernels"], ["compare", "m"], ["allocate", "o", "--budget", "4"]):
        line, status = fails(capsys, *arguments, "--plot", plot)
        assert status == 1
        if arguments[0] != "allocate":  # which first looks for its folder
            assert plot in line


def test_text_of_another_locale_is_read_and_other_bytes_are_refused():
    assert options.read_text(os.fsdecode("prompt – é".encode()), "--prompt") == "prompt – é"
    for text in ("\udcff", "\ud800", "a\udc80"):
        with pytest.raises(TwlaError, match="--prompt: not UTF-8"):
            options.read_text(text + "\udcff", "--prompt")


def test_the_version_is_told_by_either_name(capsys):
    main.main(["--version"])
    assert capsys.readouterr().out == f"twla {__version__}\n"


def run(code, *arguments, **settings):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, **settings)


def test_closed_streams_are_quiet_and_their_numbers_are_not_given_to_files():
    code = (
        "import os, sys; [os.close(n) for n in (0, 1, 2)]; sys.stdin = sys.stdout = sys.stderr = None;"
        "from twla_jax.__main__ import main; sys.argv[1:] = ['--version']; main();"
        "os._exit(0 if os.open('/dev/null', 0) > 2 else 9)"
    )
    assert run(code).returncode == 0


def test_letters_that_a_terminal_lacks_are_spelled():
    code = (
        "from twla_jax.cli import main; main.COMMANDS['inspect'] = lambda: print('α → β'); main._run = lambda _:"
        " main.COMMANDS['inspect'](); main.main([])"
    )
    ended = run(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stdout) == (0, "\\u03b1 \\u2192 \\u03b2\n")


def test_a_limit_of_the_address_space_that_jax_may_abort_under_is_told(tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9));"
        "from twla_jax.__main__ import main; sys.argv[1:] = ['inspect', 'nothing']; main()"
    )
    ended = run(code, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (
        1,
        "twla: error: the address space is limited to 1.0 GB (ulimit -v), and JAX needs 2 GB; raise the limit\n",
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (MemoryError, "std::bad_alloc"),
        (JaxRuntimeError, "RESOURCE_EXHAUSTED: Out of memory\nAllocator: 9 GB"),
    ],
)
@pytest.mark.parametrize("command", main.COMMANDS)
def test_memory_that_does_not_suffice_is_one_line_that_names_what_helps(
    kind, said, command, monkeypatch, capsys
):
    error = kind(said)
    error.add_note("what is finished is kept in out.partial")
    monkeypatch.setattr(main, "_run", lambda _: (_ for _ in ()).throw(error))
    line, status = fails(capsys, command, "m")
    assert status == 1
    assert line.startswith("twla: error: the memory does not suffice (")
    assert line.endswith("; what is finished is kept in out.partial")
    assert "Allocator" not in line
    named = {name.replace("-", "_") for name in re.findall(r"--([a-z-]+)", line)}
    assert named <= inspect.signature(main.COMMANDS[command]).parameters.keys()
    assert bool(named) == (command in failures.CURES)


def test_a_current_folder_that_was_removed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for arguments in (["inspect", "model"], ["quantize", "model", "out"], ["eval", "."]):
        line, status = fails(capsys, *arguments)
        assert status == 1
        assert "the current folder was removed" in line


KILL = "os.kill(os.getpid(), signal.SIGINT)"
COMMAND = "from twla_jax.cli import main; main._run = lambda _: {}\n"
INTERRUPTED = {
    "while modules are imported": f"sys.meta_path.insert(0, type('F', (), {{'find_spec': lambda *_: {KILL}}}))\n",
    "at work": COMMAND.format(f"[{KILL}, time.sleep(9)]"),
    "in a callback whose errors Python passes over": (
        f"class Late:\n    def __del__(self): {KILL}; time.sleep(1)\n" + COMMAND.format("[Late(), 0][1]")
    ),
    "at exit": f"import atexit; atexit.register(lambda: [{KILL}, time.sleep(9)])\n" + COMMAND.format("0"),
}


@pytest.mark.parametrize("when", INTERRUPTED)
def test_an_interrupt_at_any_time_ends_with_130_and_no_traceback(when):
    code = (
        f"import os, signal, sys, time\nfrom twla_jax import __main__\n{INTERRUPTED[when]}__main__.main()\n"
    )
    ended = run(code, timeout=60)
    assert ended.returncode == interrupts.STATUS, ended.stderr
    assert ended.stderr in ("", "twla: error: interrupted\n")


def test_a_process_that_was_told_to_ignore_interrupts_does():
    # As `nohup` leaves it, but set from inside: forking a process that runs JAX is not safe.
    before = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nsys.argv[1:] = ['--version']\n"
    )
    command = "from twla_jax.__main__ import main\nmain()\n"
    ended = run(before + command + "assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN")
    assert ended.returncode == 0, ended.stderr
