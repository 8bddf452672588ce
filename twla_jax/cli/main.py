"""Runs `twla`: figures go to stdout, progress to stderr, and a user's mistake is one line.

Heavy packages are imported only when a command runs, so that `--help` answers at once.
"""

import contextlib
import functools
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterator

import tyro

from twla_jax import compilation_cache, xla_flags
from twla_jax.cli import command_line, failures, interrupts, loudness
from twla_jax.cli.bench import bench
from twla_jax.cli.chat import chat
from twla_jax.cli.evaluate import evaluate
from twla_jax.cli.export import export
from twla_jax.cli.make import allocate, compare, demo
from twla_jax.cli.quantize import quantize
from twla_jax.cli.report import report
from twla_jax.cli.serve import serve
from twla_jax.cli.use import generate, inspect
from twla_jax.errors import TwlaError
from twla_jax.version import __version__

COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "allocate": allocate,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "inspect": inspect,
    "export": export,
    "report": report,
    "compare": compare,
    "bench": bench,
    "demo": demo,
}
_WIDTH = 80
_SHELLS = ("bash", "zsh", "fish", "tcsh")
_DESCRIPTION = (
    "Quantise language models to ternary weights and low-bit activations, and use them. twla COMMAND --help explains a"
    f" command, twla --version prints the version, and twla --completion {'|'.join(_SHELLS)} a script that completes"
    " commands and options. With -q a command shows no progress, with -v also what the library logs."
    " Compiled programs are kept in ~/.cache/twla_jax/compiled, at most 1 GiB;"
    " TWLA_COMPILATION_CACHE=off keeps none, and =FOLDER keeps them there."
)


def main(arguments: list[str] | None = None) -> None:
    """Run `twla`. Exits with 0 on success, 2 for a wrong command line, 130 when interrupted, and 1 for other errors."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _open_streams()
    xla_flags.disable_triton_gemm()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with interrupts.heard():
            _run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has gone away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:
        _fail("; ".join(["interrupted", *getattr(stop, "__notes__", [])]), interrupts.STATUS)
    except TwlaError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except Exception as error:
        if failures.is_of_memory(error):
            _fail(failures.of_memory(error, arguments[0] if arguments else ""), 1)
        if failures.is_of_hosts(error):
            _fail(failures.of_hosts(error), 1)
        if os.environ.get("TWLA_DEBUG"):
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (TWLA_DEBUG=1 shows where)", 1)


def _open_streams() -> None:
    """Make all output possible: output to a closed stream is dropped, and letters without a code are escaped.

    A closed stream's number would also go to the next file that is opened, and messages into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open to the end of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print(f"twla {__version__}")
        return
    if arguments in (["-h"], ["--help"]):
        print(_overview())
        return
    shell = _shell_to_complete(arguments)
    words, flags = command_line.read(arguments, COMMANDS)
    if flags == loudness.FLAGS.keys():
        _fail("-q and -v: one says less than usual, the other more; leave one out", 2)
    chosen: list[Callable[[], None]] = []

    def deferred(command: Callable[..., None]) -> Callable[..., None]:
        """Return the command with its call postponed, so that only errors of the parser are caught as such."""

        @functools.wraps(command)
        def call(*args, **kwargs):
            chosen.append(lambda: command(*args, **kwargs))

        return call

    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), _colours():
            tyro.extras.subcommand_cli_from_dict(
                {name: deferred(command) for name, command in COMMANDS.items()},
                prog="twla",
                description=_DESCRIPTION,
                args=["--tyro-print-completion", shell] if shell else words,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code:
            _fail(command_line.one_line(message.getvalue()), 2)
        raise
    failures.require_address_space()
    compilation_cache.keep_compiled_programs()
    with loudness.of(flags):
        chosen[0]()


def _shell_to_complete(arguments: list[str]) -> str | None:
    """Return the shell that a script for completion is asked for."""
    asked = arguments[:1] == ["--completion"]
    if asked and arguments[1:] not in [[shell] for shell in _SHELLS]:
        _fail(f"--completion takes one of {', '.join(_SHELLS)}", 2)
    return arguments[1] if asked else None


def _overview() -> str:
    """Return the commands with the first line of their help; the parser needs twice as long to say as much."""
    lines = [f"usage: twla [-h] {{{','.join(COMMANDS)}}} …", "", *textwrap.wrap(_DESCRIPTION, _WIDTH), ""]
    for name, command in COMMANDS.items():
        told = (command.__doc__ or "").partition("\n")[0]
        lines += textwrap.wrap(told, _WIDTH, initial_indent=f"  {name:10}", subsequent_indent=" " * 12)
    return "\n".join(lines)


@contextlib.contextmanager
def _colours() -> Iterator[None]:
    """Let the parser colour its help only where `NO_COLOR` is not set (no-color.org)."""
    terminal = os.environ.get("TERM")
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        if terminal is None:
            os.environ.pop("TERM", None)
        else:
            os.environ["TERM"] = terminal


def _fail(message: str, status: int) -> None:
    message += failures.of_the_current_folder() if status == 1 else ""
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in " ".join(message.split()))
    print(f"twla: error: {line}", file=sys.stderr)
    failures.end(status)


if __name__ == "__main__":
    main()
