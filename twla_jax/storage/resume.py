"""Keeps finished parts of long work in a folder, so that an interrupted run goes on where it was."""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax import hosts
from twla_jax.errors import TwlaError
from twla_jax.models.stored_layers import StoredLayers
from twla_jax.storage import locks

_IDENTITY = "fingerprint.json"
_GROUP = "belongs to"  # the name inside a group's file; no array of a caller is called so
# A file that was being written; without the number, as earlier versions named it.
_TEMPORARY = re.compile(r"\.(fingerprint\.json|.+\.npz)(\.[0-9a-f]{16})?\.tmp")
_LOCK = re.compile(r"\..+\.lock")  # of a folder inside


def fingerprint(settings: Any, arrays: Iterable[np.ndarray | StoredLayers]) -> str:
    """Return the SHA-256 of JSON-ready settings and of arrays with their shapes and dtypes, in order."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for array in arrays:
        stored = isinstance(array, StoredLayers)
        digest.update(f"{array.dtype}{array.shape}".encode())
        for part in array if stored else [array]:
            # A matrix in a file is taken as it lies there: often the other way round, which costs a copy to mend.
            part = np.ascontiguousarray(part.T if stored and part.flags.f_contiguous else part)
            digest.update(part.view(np.uint8) if part.size else b"")
    return digest.hexdigest()


def leaves(model: Any) -> list[Any]:
    """Return the arrays of a model as `fingerprint` takes them: on the host, or in files."""
    return [leaf if isinstance(leaf, StoredLayers) else np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def keeps_work_dir[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that keeps the folder given as `work_dir`, if one is, to itself while it runs.

    Two calls that write one folder would each take the other's parts for its own: the second is refused.

    Args:
      function: with an argument `work_dir`, a path or None.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        folder = signature.bind(*args, **kwargs).arguments.get("work_dir")
        with contextlib.nullcontext() if folder is None else locks.hold(Path(folder)):
            return function(*args, **kwargs)

    return run


class WorkDir:
    """Named groups of arrays in a folder, each written whole or not at all.

    The folder belongs to one fingerprint, and every group says which fingerprint and name it was saved under: results
    of another model, text or recipe, or of another part of this one, are never mixed in.
    """

    def __init__(self, folder: Path, fingerprint: str):
        """Open or make the folder, and remove what a killed run was about to write there.

        Raises:
          TwlaError: it holds the work of another fingerprint, or something else altogether, or cannot be read.
        """
        self._folder, self._fingerprint = folder, fingerprint
        identity = folder / _IDENTITY
        if identity.is_file():
            if _read_identity(identity) != fingerprint:
                raise TwlaError(
                    f"{folder}: holds unfinished work on another model, text or recipe, or by another version of twla;"
                    " remove it or choose another OUT"
                )
        elif folder.exists() and not _holds_only_work(folder):
            raise TwlaError(f"{folder}: exists and holds no unfinished work; remove it or choose another OUT")
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TwlaError(f"{folder}: cannot be made ({error.strerror})") from None
            self._write(_IDENTITY, lambda file: file.write(json.dumps({"sha256": fingerprint}).encode()))
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write a group; a crash leaves the earlier one of that name, or none.

        Raises:
          TwlaError: the disk is full.
        """
        stored = {key: _as_bytes(array) for key, array in arrays.items()}
        stored[_GROUP] = self._group(name)
        self._write(f"{name}.npz", lambda file: np.savez(file, allow_pickle=False, **stored))

    def load(self, name: str, only: str | None = None) -> dict[str, np.ndarray] | None:
        """Return a group saved before, or None; with `only`, this array of it, and no other is read.

        Raises:
          TwlaError: the file is damaged, or was saved under another name or fingerprint.
        """
        path = self._folder / f"{name}.npz"
        if not os.path.lexists(path):
            return None
        with self._open(path) as group:
            wanted = group.files if only is None else [only, _GROUP]
            arrays = {key: group[key] for key in wanted}
        if not np.array_equal(arrays.pop(_GROUP, None), self._group(name)):
            raise TwlaError(f"{path}: belongs to another part of the work or to other work; {self._advice()}")
        return {key: _from_bytes(array) for key, array in arrays.items()}

    def load_for_all(self, name: str) -> dict[str, np.ndarray] | None:
        """Return what `load` does in the first of several processes, in each of them; an array at a time is sent."""
        if not hosts.several():
            return self.load(name)
        names = hosts.from_first(lambda: self.names(name))
        if names is None:
            return None

        def array(each: str) -> np.ndarray:
            return hosts.from_first(lambda: self.require(name, each)[each])

        return {each: array(each) for each in names}

    def save_once(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write a group as `save` does, of several processes only in the first."""
        if hosts.is_first():
            self.save(name, arrays)

    def names(self, name: str) -> list[str] | None:
        """Return the names of the arrays in a group saved before, or None; no array is read.

        Raises:
          TwlaError: the file is damaged.
        """
        path = self._folder / f"{name}.npz"
        if not os.path.lexists(path):
            return None
        with self._open(path) as group:
            return [key for key in group.files if key != _GROUP]

    def require(self, name: str, only: str | None = None) -> dict[str, np.ndarray]:
        """Return a group that has to be there, since a later one was saved after it; `only` as `load` takes it.

        Raises:
          TwlaError: as `load`, or the group is missing.
        """
        if (arrays := self.load(name, only)) is None:
            raise TwlaError(f"{self._folder / name}.npz: missing; {self._advice()}")
        return arrays

    @property
    def folder(self) -> Path:
        """Return where the groups are."""
        return self._folder

    def _advice(self) -> str:
        return f"remove {self._folder} and start again"

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        try:
            if not path.is_file():
                raise ValueError("no regular file")
            with path.open("rb") as file, np.load(file) as group:
                yield group
        except Exception:  # numpy, zipfile and zlib raise a dozen kinds for what is no such file
            raise TwlaError(f"{path}: damaged; {self._advice()}") from None

    def _group(self, name: str) -> np.ndarray:
        """Return the bytes by which a group knows where it belongs."""
        return np.frombuffer(f"{self._fingerprint}/{name}".encode(), np.uint8)

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        path = self._folder / name
        temporary = path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise TwlaError(f"{path}: {error.strerror or error}{_room_left(self._folder)}") from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _read_identity(path: Path) -> str:
    """Return the fingerprint that a working folder belongs to."""
    try:
        identity = json.loads(path.read_bytes())
        if isinstance(identity, dict) and isinstance(identity["sha256"], str):
            return identity["sha256"]
    except (OSError, ValueError, KeyError, RecursionError):
        pass
    raise TwlaError(f"{path}: damaged; remove {path.parent} and start again")


def _holds_only_work(folder: Path) -> bool:
    """Return whether a folder holds nothing but working folders of earlier stages and unfinished files."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    return all(
        _TEMPORARY.fullmatch(entry.name)
        or _LOCK.fullmatch(entry.name)
        or (entry / _IDENTITY).is_file()
        or _holds_only_work(entry)
        for entry in folder.iterdir()
    )


def _room_left(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB left)"
    except OSError:
        return ""


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array; bfloat16, which numpy files cannot name, as a structured array of one field that names it."""
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
    """Return the leaves of a pytree by their place, as `WorkDir.save` takes them."""
    return {str(index): hosts.fetch(leaf) for index, leaf in enumerate(jax.tree.leaves(tree))}


def unflatten(like: Any, saved: dict[str, np.ndarray]) -> Any:
    """Return what `flatten` was given, each array where that of `like` lies.

    Args:
      like: arrays of that structure, on a device, a mesh or in the host's memory; of what was donated, too.
      saved: what `flatten` returned.
    """
    leaves, structure = jax.tree.flatten(like)

    def placed(leaf: jax.Array, array: np.ndarray) -> jax.Array:
        # What lies nowhere in particular stays so. What is split is never whole on one device.
        return hosts.put(array, leaf.sharding) if leaf.committed else jnp.asarray(array)

    arrays = [placed(leaf, saved[str(index)]) for index, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def discard(tree: Any) -> None:
    """Free the arrays of a pytree on their devices, whoever else holds them."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()
