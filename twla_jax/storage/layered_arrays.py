"""Saves arrays whose layers are in files, a layer at a time: orbax writes the first layers, and the others follow.

An array of a checkpoint is one uncompressed chunk, so its file is its layers, one after the other.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from twla_jax.models.stored_layers import StoredLayers
from twla_jax.storage.codec import pack_stored

_DESCRIPTIONS = ("_METADATA", "array_metadatas/process_0")  # in which orbax names the shapes of all arrays
_SHAPES = ("write_shape", "chunk_shape")


class _Packed(StoredLayers):
    """Codes as they lie on the disk, which orbax describes as an array of JAX, as those packed in memory are."""


def packed(array: StoredLayers, codec: Any) -> StoredLayers:
    """Return codes as they lie on the disk from those in memory, packed when a layer is read."""
    first = pack_stored(jnp.asarray(array[0]), codec)

    def read(index: int) -> np.ndarray:
        return np.asarray(pack_stored(jnp.asarray(array[index]), codec))

    return _Packed(read, (len(array), *first.shape), first.dtype)


def first_layers(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return what orbax is given: of arrays in files the first layer `[1, ...]`, all others as they are."""

    def first(array: Any) -> Any:
        if not isinstance(array, StoredLayers):
            return array
        return jnp.asarray(array[:1]) if isinstance(array, _Packed) else array[:1]

    return {name: first(array) for name, array in arrays.items()}


def append_layers(params: Path, arrays: Mapping[str, Any]) -> None:
    """Add the other layers to a checkpoint that `first_layers` were saved as, and to its descriptions.

    Args:
      params: the checkpoint's folder.
      arrays: as `first_layers` took them.
    """
    stored = {name: array for name, array in arrays.items() if isinstance(array, StoredLayers)}
    for name, array in stored.items():
        with (params / name / ".".join("0" * array.ndim)).open("ab") as file:
            for index in range(1, len(array)):
                file.write(np.ascontiguousarray(array[index]).tobytes())
        own = params / name / ".zarray"
        described = json.loads(own.read_text())
        described["shape"] = described["chunks"] = list(array.shape)
        own.write_text(json.dumps(described, separators=(",", ":")))
    for path in (params / name for name in _DESCRIPTIONS if stored):
        described = json.loads(path.read_text())
        for name, entry in _entries(described):
            if name in stored:
                entry |= {key: list(stored[name].shape) for key in _SHAPES if key in entry}
        path.write_text(json.dumps(described))


def _entries(described: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return every array's description in one of orbax's files, with its name."""
    by_tree = described.get("tree_metadata", {}).values()
    found = [(entry["key_metadata"][0]["key"], entry["value_metadata"]) for entry in by_tree]
    listed = (entry["array_metadata"] for entry in described.get("array_metadatas", []))
    return found + [(entry["param_name"], entry) for entry in listed]
