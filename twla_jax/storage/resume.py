"""A working folder in which long work leaves what it has finished, so that an interrupted run goes on where it was."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.errors import TwlaError

_IDENTITY = "fingerprint.json"


def fingerprint(settings: Any, arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of JSON-ready settings and of arrays with their shapes and dtypes, in order."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.view(np.uint8) if array.size else b"")
    return digest.hexdigest()


class WorkDir:
    """Named groups of arrays in a folder, each written whole or not at all.

    The folder belongs to one fingerprint: results of another model, text or recipe are never mixed in.
    """

    def __init__(self, folder: Path, fingerprint: str):
        """Opens or makes the folder.

        Raises:
          TwlaError: it holds the work of another fingerprint, or something else altogether.
        """
        self._folder = folder
        identity = folder / _IDENTITY
        if identity.is_file():
            if json.loads(identity.read_text())["sha256"] != fingerprint:
                raise TwlaError(
                    f"{folder}: holds unfinished work on another model, text or recipe; remove it or choose another OUT"
                )
        elif folder.exists() and not _holds_only_work(folder):
            raise TwlaError(f"{folder}: exists and holds no unfinished work; remove it or choose another OUT")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._write(_IDENTITY, lambda path: path.write_text(json.dumps({"sha256": fingerprint})))

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Writes a group; a crash leaves the earlier one of that name, or none.

        Raises:
          TwlaError: the disk is full.
        """

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, **{key: _as_bytes(array) for key, array in arrays.items()})

        self._write(f"{name}.npz", write)

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """A group saved before, or None.

        Raises:
          TwlaError: the file is damaged.
        """
        path = self._folder / f"{name}.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path) as file:
                return {key: _from_bytes(file[key]) for key in file.files}
        except (ValueError, OSError, zipfile.BadZipFile):
            raise TwlaError(f"{path}: damaged; remove {self._folder} and start again") from None

    def _write(self, name: str, write) -> None:
        path = self._folder / name
        temporary = path.with_name(f".{name}.tmp")
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(self._folder).free
            raise TwlaError(f"{path}: {error.strerror or error} ({free / 1e6:.0f} MB left)") from None


def _holds_only_work(folder: Path) -> bool:
    """Whether all that is in a folder, if anything, are the working folders of earlier stages."""
    return folder.is_dir() and all((entry / _IDENTITY).is_file() for entry in folder.iterdir())


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """bfloat16, which numpy files cannot name, as a structured array of one field that names it."""
    array = np.asarray(array)
    if array.dtype.kind != "V":
        return array
    return array.view(np.dtype([(array.dtype.name, np.uint16)]))


def _from_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype.names is None:
        return array
    import ml_dtypes

    return array.view(np.dtype(getattr(ml_dtypes, array.dtype.names[0])))


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a pytree by their place, as `WorkDir.save` takes them."""
    return {str(index): np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(tree))}


def unflatten(like: Any, saved: dict[str, np.ndarray]) -> Any:
    """What `flatten` was given, on the device; `like` has its structure."""
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [jnp.asarray(saved[str(index)]) for index in range(len(leaves))])
