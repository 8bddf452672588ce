"""Writes the packed model as one safetensors file: every array as it lies in the folder, the manifest in the header."""

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from twla_jax.storage.checkpoint import FORMAT_VERSION, CheckpointInfo
from twla_jax.storage.export import safetensors_file
from twla_jax.storage.export.safetensors_file import Tensor
from twla_jax.version import __version__

FILE = "model.safetensors"


def write(source: Path, info: CheckpointInfo, folder: Path) -> None:
    """Copy the arrays of a folder that `checkpoint.save` wrote into `folder/model.safetensors`.

    The header's `__metadata__` holds what a reader needs: `format` ("twla"), `format_version`, and as JSON texts the
    `config` of the decoder, the `recipe`, and `tensors`, each parameter's kind and static fields. docs/format.md says
    what they mean.
    """
    tensors = []
    for name, entry in info.tensors.items():
        for part, array in entry["arrays"].items():
            stored = f"{name}.{part}" if part else name
            shape, dtype = tuple(array["shape"]), jnp.dtype(array["dtype"])
            chunk = source / "params" / stored / ".".join("0" * len(shape))
            tensors.append(Tensor(stored, dtype, shape, functools.partial(_read, chunk, dtype, shape)))
    metadata: dict[str, Any] = {
        "config": info.config.to_dict(),
        "recipe": info.recipe.to_dict(),
        "tensors": {name: {"kind": e["kind"], "static": e["static"]} for name, e in info.tensors.items()},
    }
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts |= {"format": "twla", "format_version": str(FORMAT_VERSION), "twla_jax": __version__}
    safetensors_file.write_file(folder / FILE, tensors, texts)


def _read(chunk: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.fromfile(chunk, dtype).reshape(shape)
