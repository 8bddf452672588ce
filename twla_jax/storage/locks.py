"""Keeps a folder for one run, and clears up what runs before it left when they were killed."""

import contextlib
import contextvars
import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from twla_jax.errors import TwlaError

# File systems without locks, such as some network ones, answer with these.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_HELD: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("held", default=frozenset())


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[bool]:
    """Keep `folder`, there or not yet, for the caller, and yield whether no other process or thread can hold it now.

    False where the caller holds it already, or the file system locks nothing.

    The lock is the system's own, on a hidden file beside the folder: it ends with the process, however that ends. Where
    the folder is held already by the caller, nothing more is done. Missing parents are made, and go again if they
    stay empty. Temporary folders that killed runs left beside it are removed, and a folder that was being replaced when
    a run was killed is put back.

    Raises:
      TwlaError: another run holds it, or nothing can be written beside it.
    """
    folder = Path(os.path.abspath(folder))
    key = os.path.realpath(folder)
    if key in _HELD.get():
        yield False
        return
    made = _make_parents(folder)
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        descriptor, exclusive = _acquire(lock, folder)
        token = _HELD.set(_HELD.get() | {key})
        try:
            if exclusive:
                recover(folder)
            yield exclusive
        finally:
            _HELD.reset(token)
            if exclusive:
                lock.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # it holds something by now
                parent.rmdir()


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary folders and files of `folder` that lie beside it, the newest last."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(\d+|[0-9a-f]{{16}})\.(tmp|old)")
    try:
        found = [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.lstat().st_mtime_ns)
    except OSError:
        return []


def replaced_folder(folder: Path) -> Path | None:
    """Return the hidden folder that holds what was in `folder` when its replacement was cut short, if it was."""
    if os.path.lexists(folder):
        return None
    return next((path for path in reversed(leftovers(folder)) if path.name.endswith(".old")), None)


def recover(folder: Path) -> None:
    """Put back a folder whose replacement was cut short, and remove temporary ones. The caller holds `folder`."""
    if old := replaced_folder(folder):
        old.rename(folder)
        print(
            f"twla: {folder} was being replaced when an earlier run was killed; what was there before is back",
            file=sys.stderr,
        )
    for path in leftovers(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:  # of an export, which may be a single file
            path.unlink(missing_ok=True)


def _make_parents(folder: Path) -> list[Path]:
    """Make the folders above, and return those that were missing, the outermost first."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    for parent in folder.parents:  # also a link that leads nowhere
        if os.path.lexists(parent) and not parent.is_dir():
            raise TwlaError(f"{folder}: cannot be made, since {parent} is no folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TwlaError(f"{folder}: cannot be made ({error.strerror})") from None
    return missing[::-1]


def _acquire(lock: Path, folder: Path) -> tuple[int, bool]:
    """Return an open descriptor of the lock's file, and whether the file system locks files."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise TwlaError(f"{folder}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between our opening and our locking it.
            if _same_file(descriptor, lock):
                return descriptor, True
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise TwlaError(
                f"{folder}: another run is writing it; wait until it ends, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise TwlaError(f"{folder}: cannot be locked ({error.strerror})") from None


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
