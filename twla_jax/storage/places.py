"""Decides where a folder will be written, and refuses places that could not be replaced, before any work."""

import os
import re
from pathlib import Path

from twla_jax.errors import TwlaError

_LONGEST_NAME = 200  # bytes; hidden folders beside it have longer names, and most systems allow 255
_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(rb"\\([0-7]{3})")  # how the system writes blanks in that file


def resolve_place(out: str | Path) -> Path:
    """Return the path that a folder given as `out` is written to.

    A link is followed, so that what it leads to is replaced and not the link; `~` is the home folder.

    Raises:
      TwlaError: the name is empty, cannot be a file's name, or is the current folder or one that holds it.
    """
    text = os.fspath(out)
    if not text.strip():
        raise TwlaError("the folder to write has an empty name")
    path = expand(text)
    if path.is_symlink() or path.name in ("", ".."):
        path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise TwlaError(f"{out}: is a link that leads back to itself")
    try:
        here, place = os.path.realpath(os.getcwd()), os.path.realpath(path)
    except FileNotFoundError:
        raise TwlaError("the current folder was removed; change to another one") from None
    if here == place or here.startswith(place.rstrip("/") + "/"):
        raise TwlaError(f"{out}: is the current folder or holds it; name a folder inside it")
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise TwlaError(f"{path.name[:60]}…: the name is longer than {_LONGEST_NAME} bytes")
    return path


def expand(text: str | Path) -> Path:
    """Return a path with `~` as the home folder.

    Raises:
      TwlaError: the text holds a null byte or bytes that are no text here, or there is no such home.
    """
    text = os.fspath(text)
    if "\0" in text:
        raise TwlaError(f"{text!r}: a file's name holds no null byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TwlaError(f"{text!a}: the name is no text in this locale; set PYTHONUTF8=1") from None
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:
        raise TwlaError(
            f"{text}: there is no such home folder; write ./{text} for a folder of that name"
        ) from None


def require_replaceable(folder: Path) -> None:
    """Refuse a folder that another cannot take the place of.

    Raises:
      TwlaError: it is a file, or a file system is mounted on it.
    """
    if folder.exists() and not folder.is_dir():
        raise TwlaError(f"{folder}: is a file, not a folder")
    if folder.is_dir() and (os.path.ismount(folder) or _is_bind_mount(folder)):
        raise TwlaError(f"{folder}: is a mount point, which cannot be replaced; name a folder inside it")


def _is_bind_mount(folder: Path) -> bool:
    """Return whether Linux lists the folder as a mount point; `os.path.ismount` misses those of the same device."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    points = {_ESCAPE.sub(lambda code: bytes([int(code[1], 8)]), line.split(b" ")[4]) for line in lines}
    return os.fsencode(os.path.realpath(folder)) in points
