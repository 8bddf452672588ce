"""A folder that appears in its place whole or not at all."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twla_jax.errors import TwlaError


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to fill, which then takes its place; after an error nothing of it is left."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with _disk_errors(folder):
            temporary.mkdir()
            yield temporary
            _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def files(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fingerprint(path: Path, sync: bool = False) -> dict[str, Any]:
    """A file's size and SHA-256; `sync` first sees to it that it is on the disk."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`; where the file system cannot, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _replace(temporary: Path, folder: Path) -> None:
    """Renames `temporary` to `folder`, whose old contents go only once the new ones are in place."""
    if folder.is_dir() and any(folder.iterdir()):
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old)
    else:
        temporary.rename(folder)  # an empty folder is replaced
    descriptor = os.open(folder.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        full = os.strerror(errno.ENOSPC)
        if getattr(error, "errno", None) == errno.ENOSPC or full in str(error):
            raise TwlaError(f"{folder}: {full.lower()}; nothing was written") from None
        if isinstance(error, OSError):
            raise TwlaError(f"{folder}: {error.strerror or error}; nothing was written") from None
        raise
