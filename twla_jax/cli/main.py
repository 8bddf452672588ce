"""The entry point of `twla`: figures go to stdout, progress to stderr, and a user's mistake is one line.

Heavy packages are imported only when a command runs, so that `--help` answers at once.
"""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable

import tyro

from twla_jax import xla_flags
from twla_jax.cli.bench import bench
from twla_jax.cli.make import allocate, compare, demo, quantize
from twla_jax.cli.use import evaluate, generate, inspect
from twla_jax.errors import TwlaError

COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "allocate": allocate,
    "eval": evaluate,
    "generate": generate,
    "inspect": inspect,
    "compare": compare,
    "bench": bench,
    "demo": demo,
}


def main(arguments: list[str] | None = None) -> None:
    """Run `twla`. Exits with 0 on success, 2 for a wrong command line, 130 when interrupted, and 1 for other errors."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    xla_flags.take_products_from_libraries()
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except TwlaError as error:
        _fail(str(error), 1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except Exception as error:
        if os.environ.get("TWLA_DEBUG"):
            raise
        _fail(f"unexpected {type(error).__name__}: {error} (TWLA_DEBUG=1 shows where)", 1)


def _run(arguments: list[str]) -> None:
    chosen: list[Callable[[], None]] = []

    def deferred(command: Callable[..., None]) -> Callable[..., None]:
        """Return the command with its call postponed, so that only errors of the parser are caught as such."""

        @functools.wraps(command)
        def call(*args, **kwargs):
            chosen.append(lambda: command(*args, **kwargs))

        return call

    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            tyro.extras.subcommand_cli_from_dict(
                {name: deferred(command) for name, command in COMMANDS.items()},
                prog="twla",
                description="Quantise language models to ternary weights and low-bit activations, and use them.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code:
            _fail(_one_line(message.getvalue()), 2)
        raise
    chosen[0]()


def _one_line(box: str) -> str:
    """Return the parser's message without its frame, help texts and line breaks."""
    words = []
    for line in box.splitlines():
        content = line.strip("│─ ").strip()
        if content.startswith(("For full helptext", "Argument helptext", "Got errors")):
            break
        if not content.startswith(("╭", "╰")):
            words.append(content)
    return " ".join(" ".join(words).split()) or "wrong command line; see twla --help"


def _fail(message: str, status: int) -> None:
    print(f"twla: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
