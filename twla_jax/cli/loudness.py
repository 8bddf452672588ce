"""Makes a command say less than usual (`-q`), or more (`-v`)."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

FLAGS = {"-q": ("-q", "--quiet"), "-v": ("-v", "--verbose")}
_QUIET = {"TWLA_QUIET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # the first is that of `twla_jax.progress`


@contextlib.contextmanager
def of(flags: set[str]) -> Iterator[None]:
    """Let what runs inside say as much as the flags ask for, on stderr: warnings and errors always."""
    with contextlib.ExitStack() as stack:
        if "-q" in flags:
            stack.enter_context(_set(_QUIET))
        if "-v" in flags:
            stack.enter_context(_logged())
        yield


@contextlib.contextmanager
def _set(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    logger, handler = logging.getLogger("twla_jax"), _line_handler()
    level, passed_on = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passed_on


def _line_handler() -> logging.StreamHandler[Any]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("twla: %(name)s: %(message)s"))
    return handler
