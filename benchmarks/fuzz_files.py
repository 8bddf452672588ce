"""Holds the small files that `fuzz.py` feeds to readers in memory, where the reader is Python's own."""

import io
import os
import stat
from pathlib import Path, PosixPath
from typing import Any

# Read by other than Python's files: these lie on the disk.
_MAPPED = (".safetensors", ".gguf", ".gz", ".zst")
_held: dict[str, bytes] = {}
_written: dict[str, bytes] = {}
_known: dict[str, "MemoryPath"] = {}
_MOST = 1000  # paths that are kept
_CONVERTED = ("encoding", "errors", "newline")


class MemoryPath(PosixPath):
    """A path whose file may be held in memory; all else is as on the disk.

    The same text gives the same object, so that it is parsed once.
    """

    def __new__(cls, *parts: Any) -> "MemoryPath":
        """Return the path itself of a path alone, as nothing can change it."""
        if len(parts) == 1:
            if type(parts[0]) is cls:
                return parts[0]
            if (path := _known.get(parts[0] if type(parts[0]) is str else "")) is not None:
                return path
        path = super().__new__(cls)
        if len(parts) == 1 and type(parts[0]) is str and len(_known) < _MOST:
            _known[parts[0]] = path
        return path

    def __init__(self, *parts: Any) -> None:
        """Take the parts, once."""
        if not hasattr(self, "_raw_paths"):
            super().__init__(*parts)

    def __truediv__(self, name: Any) -> "MemoryPath":
        """Return the path of what has this name in the folder."""
        if type(name) is str and name[:1] not in ("", "/"):
            return MemoryPath(f"{self}/{name}")
        return super().__truediv__(name)

    def __rtruediv__(self, folder: Any) -> "MemoryPath":
        """Return this path below another one, also where that is an ordinary path."""
        return self if self.is_absolute() else MemoryPath(folder, self)

    def open(self, mode: str = "r", *args: Any, **options: Any) -> Any:
        """Open the file, of those in memory for reading."""
        if (data := _held.get(str(self))) is None:
            return super().open(mode, *args, **options)
        if "b" in mode:
            return io.BytesIO(data)
        return io.TextIOWrapper(
            io.BytesIO(data), **{name: options[name] for name in _CONVERTED if name in options}
        )

    def read_bytes(self) -> bytes:
        """Return what the file holds."""
        return super().read_bytes() if (data := _held.get(str(self))) is None else data

    def write_text(self, data: str, *args: Any, **options: Any) -> int:
        """Replace what the file holds."""
        if str(self) not in _held:
            return super().write_text(data, *args, **options)
        _held[str(self)] = data.encode()
        return len(data)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return what the system says of a regular file of this size."""
        if (data := _held.get(str(self))) is None:
            return super().stat(follow_symlinks=follow_symlinks)
        return os.stat_result((stat.S_IFREG | 0o644, 1, 1, 1, 0, 0, len(data), 0, 0, 0))

    def resolve(self, strict: bool = False) -> "MemoryPath":
        """Return the path itself where its file is in memory: there are no links."""
        return self if str(self) in _held else super().resolve(strict)


def put(folder: Path, files: dict[str, bytes], *, on_disk: bool = False) -> MemoryPath:
    """Return the folder with these files in it and none that an earlier call put there.

    Args:
      folder: on the disk.
      files: by name.
      on_disk: also those that Python reads.
    """
    wanted = {f"{folder}/{name}": content for name, content in files.items()}
    apart = {name for name in wanted if on_disk or name.endswith(_MAPPED)}
    _held.clear()
    _held.update(wanted)
    for name in apart:
        del _held[name]
    for name in _written.keys() - apart:
        os.unlink(name)
        del _written[name]
    for name in apart:
        if _written.get(name) != wanted[name]:
            with open(name, "wb", buffering=0) as file:
                file.write(wanted[name])
            _written[name] = wanted[name]
    return MemoryPath(str(folder))


def hold(folder: Path) -> None:
    """Take what is in a folder into memory, from where it is read from then on."""
    _held.update({str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
