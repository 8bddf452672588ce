"""Writes a folder that appears in its place whole or not at all."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.storage.exchange import exchange
from twla_jax.storage.locks import hold

_PATIENCE = 5.0  # seconds that threads of a failed save may go on writing


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yield a folder beside `folder` to fill, which then takes its place; after an error nothing of it is left.

    The contents before go only once the new ones are in place. Where the system can exchange names, there is no moment
    without one of the two.

    Raises:
      TwlaError: the disk is full or otherwise fails, or another run is writing `folder`.
    """
    with hold(folder):
        temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        made: os.stat_result | None = None
        try:
            temporary.mkdir()
            made = temporary.stat()
            yield temporary
            _sync_folders(temporary)
            _replace(temporary, folder)
        except Exception as error:
            in_place = made is not None and folder.exists() and os.path.samestat(made, folder.stat())
            removed = _remove(temporary)
            reason = _disk_error(error)
            if reason is None:
                raise
            if in_place:
                state = "the new contents are in place, but may not be on the disk yet"
            else:
                state = (
                    "nothing was written" if removed else f"unfinished, and {temporary} could not be removed"
                )
            raise TwlaError(f"{folder}: {reason}; {state}") from None
        except BaseException:
            _remove(temporary)
            raise
        _remove(temporary)  # by now what was in place before, where names were exchanged


def discard_work(work: Path, folder: Path) -> None:
    """Remove the finished parts in `work`, which lies beside `folder`, under a name by which no run takes them up.

    What a kill leaves of them, the next run that holds `folder` removes. The caller holds it.
    """
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    with contextlib.suppress(OSError):  # there is none, or it cannot be renamed
        work.rename(hidden)
        work = hidden
    shutil.rmtree(work, ignore_errors=True)


def files(folder: Path) -> list[Path]:
    """Return every file below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fingerprint(path: Path, sync: bool = False) -> dict[str, Any]:
    """Return a file's size and SHA-256; `sync` first sees to it that it is on the disk."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; where the file system cannot, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def require_room(folder: Path, sizes: list[int]) -> None:
    """Refuse to begin writing files of these sizes where they do not fit.

    Args:
      folder: whose parent, which exists, lies on the disk in question.
      sizes: bytes of each file; each has a folder and a description of its own.

    Raises:
      TwlaError: too few bytes or too few new files are left on the disk.
    """
    block = 4096
    needed = sum(-(-size // block) * block + 2 * block for size in sizes)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise TwlaError(f"{folder}: needs {needed / 1e6:.1f} MB, but the disk has {free / 1e6:.1f} MB left")
    system = os.statvfs(folder.parent)
    count = 3 * len(sizes) + 24
    if system.f_files and system.f_favail < count:
        raise TwlaError(
            f"{folder}: needs {count} new files, but the disk has room for {system.f_favail} (no inodes left)"
        )


def _replace(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; what was there before takes the temporary name or is removed."""
    if not folder.is_dir() or not any(folder.iterdir()):
        temporary.rename(folder)  # an empty folder is replaced
    elif not exchange(temporary, folder):
        # Killed between these two lines, the next run finds the old folder and puts it back: see `locks.recover`.
        old = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.old")
        folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            if not folder.exists():
                old.rename(folder)
            raise
        _remove(old)
    _sync(folder.parent)


def _remove(folder: Path) -> bool:
    """Remove a folder into which threads of a failed save may still be writing; return whether it is gone."""
    until = time.monotonic() + _PATIENCE
    while os.path.lexists(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > until:
            break
        if os.path.lexists(folder):
            time.sleep(0.05)
    return not os.path.lexists(folder)


def _sync_folders(folder: Path) -> None:
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync(path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: Exception) -> str | None:
    """Return what the system says of an error of the disk, also of one that a library wraps; None for others."""
    for code in (errno.ENOSPC, errno.EDQUOT):
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return os.strerror(code).lower()
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return None
