"""Keeps the place of a quantised model for a run: refuses what would be lost before hours of work."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from twla_jax.errors import TwlaError
from twla_jax.storage import locks, places
from twla_jax.storage.manifest import is_checkpoint, read_manifest, unlisted


@contextlib.contextmanager
def claim(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Keep the place of a folder for the caller, from before hours of work until it is saved there.

    Returns:
      (as a context) the path to give to `save`; a link is followed.

    Raises:
      TwlaError: what `resolve_place`, `check_output` and `hold` refuse.
    """
    folder = places.resolve_place(out)
    with locks.hold(folder):
        check_output(folder, overwrite)
        yield folder


@contextlib.contextmanager
def claim_saved(out: str | Path) -> Iterator[Path]:
    """Keep a folder that `save` wrote for the caller, who changes it by `revise`.

    Returns:
      (as a context) its path; a link is followed.

    Raises:
      TwlaError: it holds no quantised model, or what `resolve_place` and `hold` refuse.
    """
    folder = places.resolve_place(out)
    if not folder.exists() and not locks.replaced_folder(folder):
        read_manifest(folder)  # refuses, without a trace of a lock
    with locks.hold(folder):
        read_manifest(folder)
        places.require_replaceable(folder)
        yield folder


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse a place that `save` would not write to; call it before hours of work.

    Raises:
      TwlaError: `folder` is a file or a mount point, or holds something and `overwrite` is off or what it holds is no
        quantised model.
    """
    folder = Path(folder)
    places.require_replaceable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise TwlaError(f"{folder}: exists and is not empty; choose another folder or give --overwrite")
        if not is_checkpoint(folder):
            raise TwlaError(f"{folder}: holds no quantised model, so it is not overwritten")
        if others := _others(folder):
            raise TwlaError(f"{others[0]}: was not written by twla and would be lost; move it away first")


def _others(folder: Path) -> list[Path]:
    """Return the files of a quantised folder that were not saved with the model; none where it is damaged."""
    try:
        return unlisted(folder, read_manifest(folder))
    except TwlaError:
        return []
