"""Writes a file that appears in its place whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from twla_jax.errors import TwlaError


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a name for a file that then takes its place; after an error nothing of it is left."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        # numpy says how much it could write, and not why.
        reason = error.strerror or f"the disk is full, or files may be no longer ({error})"
        raise TwlaError(f"{path}: {reason}; nothing was written") from None
    finally:
        temporary.unlink(missing_ok=True)
