"""Opens files that others wrote: regular, readable and of a bounded size, or one clear line."""

import json
import stat
from pathlib import Path
from typing import Any

from twla_jax.errors import TwlaError

_LFS = b"version https://git-lfs.github.com/spec/"


def require_file(path: Path) -> int:
    """Return the size in bytes of a regular file that can be opened.

    Nothing is waited for: a FIFO or a device is refused without being opened.

    Raises:
      TwlaError: the file is missing, not a regular file, not readable, or a git-lfs pointer in its place.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise TwlaError(f"{path}: not a regular file")
        with path.open("rb") as file:
            begin = file.read(len(_LFS))
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise TwlaError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if begin == _LFS:
        raise TwlaError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` there")
    return status.st_size


def read_json(path: Path, *, longest: int = 64 << 20) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
      path: of the file.
      longest: bytes from which a file is refused unread.

    Raises:
      TwlaError: as `require_file`; the file is too long, not JSON, nested too deeply, or not an object.
    """
    size = require_file(path)
    if size > longest:
        raise TwlaError(
            f"{path}: has {size >> 20} MiB, more than the {longest >> 20} MiB that such a file may have"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise TwlaError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise TwlaError(f"{path}: not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise TwlaError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise TwlaError(f"{path}: not a JSON object")
    return content
