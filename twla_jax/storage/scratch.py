"""Gives a process a temporary folder, and clears up those of processes that were killed."""

import contextlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from twla_jax.errors import TwlaError
from twla_jax.storage import locks

_NAME = re.compile(r"twla-[0-9a-f]{16}")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder among the system's temporary ones and remove it at the end, with any that a killed process left.

    Whose process lives holds the folder's lock.

    Raises:
      TwlaError: it cannot be made.
    """
    root = Path(tempfile.gettempdir())
    _remove_leftovers(root)
    folder = root / f"twla-{secrets.token_hex(8)}"
    with locks.hold(folder):
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise TwlaError(f"{folder}: cannot be made ({error.strerror})") from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(root: Path) -> None:
    """Remove the folders whose lock nobody holds; those of other users stay."""
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                with contextlib.suppress(TwlaError), locks.hold(path) as alone:
                    if alone:
                        shutil.rmtree(path, ignore_errors=True)
