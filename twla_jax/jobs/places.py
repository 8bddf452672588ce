"""Keeps the folder that a job writes to itself, from before its work until it is done."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from twla_jax import hosts
from twla_jax.errors import TwlaError
from twla_jax.storage import checkpoint, locks
from twla_jax.storage.places import expand
from twla_jax.storage.scratch import temporary_folder

P = ParamSpec("P")
R = TypeVar("R")


def writes(*, work: str, changes_saved: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for jobs that write the folder given as `out`.

    The folder is checked and kept before the job begins: see `checkpoint.claim`. The job gets the path that is really
    written, where `out` was a link. An interrupt and an error for want of memory say what is kept. Of several hosts,
    the first has the folder; the job of another gets one that is temporary.

    Args:
      work: ending of the folder beside `out` in which the job leaves finished parts.
      changes_saved: the job changes a quantised model instead of writing a new one.
    """

    def decorate(job: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(job)

        @functools.wraps(job)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            out = bound.arguments["out"]
            if not hosts.is_first():
                with temporary_folder() as folder:
                    bound.arguments["out"] = folder / Path(out).name
                    return job(*bound.args, **bound.kwargs)
            overwrite = bool(bound.arguments.get("overwrite"))
            claim = (
                checkpoint.claim_saved(out) if changes_saved else checkpoint.claim(out, overwrite=overwrite)
            )
            with claim as place, told_when_stopped(place, place.with_name(place.name + work)):
                bound.arguments["out"] = place
                return job(*bound.args, **bound.kwargs)

        return run

    return decorate


def writes_into(file: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for jobs that add to the folder given as `out`, which other runs may not do meanwhile.

    Args:
      file: name of the file in the folder that the job writes anew from time to time.
    """

    def decorate(job: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(job)

        @functools.wraps(job)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            if not str(bound.arguments["out"]).strip():
                raise TwlaError("the folder to write has an empty name")
            out = bound.arguments["out"] = expand(bound.arguments["out"])
            if out.exists() and not out.is_dir():
                raise TwlaError(f"{out}: is a file, not a folder")
            with locks.hold(out / file):
                try:
                    return job(*bound.args, **bound.kwargs)
                except (KeyboardInterrupt, MemoryError, RuntimeError) as stop:
                    stop.add_note(f"what is finished is kept in {out}, from where the same command goes on")
                    raise

        return run

    return decorate


def check_name(name: str) -> None:
    """Refuse the name of a recipe as that of a folder inside another.

    Raises:
      TwlaError: it would lead elsewhere, or is none that every system takes.
    """
    plain = name.isprintable() and not set(name) & set('/\\:*?"<>|') and not name.startswith((".", " ", "-"))
    if not plain or not 1 <= len(name.encode(errors="replace")) <= 100:
        raise TwlaError(f"recipe name {name[:60]!r}: its folder cannot be called so; choose a plain name")


@contextlib.contextmanager
def told_when_stopped(place: Path, work: Path) -> Iterator[None]:
    """Add to an interrupt, or an error for want of memory, a note of what is written and what is kept.

    Args:
      place: the folder that appears or changes at once.
      work: the folder in which finished parts are kept.
    """
    before = _identity(place)
    try:
        yield
    except (KeyboardInterrupt, MemoryError, RuntimeError) as stop:  # the last is that of JAX
        if _identity(place) != before:
            stop.add_note(f"{place} is written and whole")
        else:
            stop.add_note(f"{place} is {'as it was' if before else 'not written'}")
            if work.exists():
                stop.add_note(f"what is finished is kept in {work}, from where the same command goes on")
        raise


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from the one that replaces it."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
