"""Reads the safetensors files of a model folder as one source of named tensors."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from twla_jax.errors import TwlaError
from twla_jax.json_files import read_json, require_file
from twla_jax.schema import check_values, mapping, text

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float32),  # rounded when it is read; no decoder computes in more
}
_LONGEST_NAME = 255  # of a file, in bytes
_ROWS = 4096  # of two tensors that are compared
# How the tensors of weights that are quantised already are called, and by which tools.
_QUANTIZED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_blocks": "MXFP4",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
}
# What may stand where `model.` is usual, the longer ones first.
_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "text_model.", "")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


class Shards:
    """Every tensor of every file; the files are mapped, and read tensor by tensor."""

    def __init__(self, folder: Path, *, packed: Collection[str] = ()):
        """Open the files that the index names, or the single one.

        Args:
          folder: of the model.
          packed: endings of names, of those that tell weights in few bits, which the caller makes numbers of.

        Raises:
          TwlaError: a file is missing, unreadable, not safetensors, or lacks what the index places there; or there are
            an index and a `model.safetensors` that it does not name.
        """
        self._listing, promised = _listed(folder)
        paths = sorted(set(promised.values())) or [self._listing]
        self._opened = {path: _open(path) for path in paths}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        for name, path in promised.items():
            if name not in self._opened[path].keys():  # noqa: SIM118 (not a dict)
                raise TwlaError(f"{path}: tensor {name!r}, which {INDEX} places here, is missing")
        # What a file holds beyond the index is not passed over: it has to have a place, too.
        held = {name: path for path, file in self._opened.items() for name in file.keys()}  # noqa: SIM118
        self._files = {**held, **promised}
        _refuse_quantized(self._files, packed)
        self._stored = _published_names(self._files)

    def names(self) -> Collection[str]:
        """Return the published names of all tensors."""
        return self._stored.keys()

    def where(self, name: str) -> str:
        """Return the file that holds the tensor, or lists the others."""
        return str(self._files.get(self._stored.get(name, name), self._listing))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape; nothing is read."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Return the type `read` gives; TwlaError if it is no float of 16, 32 or 64 bits."""
        stored = self.stored_type(name)
        if stored not in _DTYPES:
            raise TwlaError(
                f"{self.where(name)}: tensor {name!r} is {stored}; supported are {', '.join(_DTYPES)}"
            )
        return _DTYPES[stored]

    def read(self, name: str) -> np.ndarray:
        """Return the tensor; float64 as float32, where what is too large becomes infinite."""
        # A mapping of its own, closed at once: the pages that were read count as this process's memory until then.
        path = self._files[self._stored[name]]
        try:
            with _open(path) as file, np.errstate(over="ignore"):
                tensor = file.get_tensor(self._stored[name])
                return tensor.astype(np.float32) if tensor.dtype == np.float64 else tensor
        except safetensors.SafetensorError as error:
            raise TwlaError(f"{path}: changed while it was being read ({error})") from error

    def stored_type(self, name: str) -> str:
        """Return the type by the name that safetensors has for it, `BF16`."""
        return self._slice(name).get_dtype()

    def stored_bytes(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor as they are stored: numpy has no name for some types."""
        path = self._files[self._stored[name]]
        try:
            first, header = self._header(path)
            start, end = header[self._stored[name]]["data_offsets"]
            stored = np.fromfile(path, np.uint8, end - start, offset=first + start)
            if len(stored) == math.prod(self.shape(name)):
                return stored
        except (OSError, ValueError, KeyError):  # the header was right when the file was opened
            pass
        raise TwlaError(f"{path}: changed while it was being read")

    def _header(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Return where the data of a file begin, and its header; each is parsed once, as it names every tensor."""
        if path not in self._headers:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._headers[path] = 8 + length, json.loads(file.read(length))
        return self._headers[path]

    def equal(self, one: str, other: str) -> bool:
        """Return whether two matrices hold the same values; some rows of each are in memory at a time."""
        _ = self.dtype(one), self.dtype(other)  # refuses what cannot be read
        shape = self.shape(one)
        if shape != self.shape(other) or len(shape) != 2:
            return False
        first, second = self._slice(one), self._slice(other)
        rows = (slice(start, min(start + _ROWS, shape[0])) for start in range(0, shape[0], _ROWS))
        return all(np.array_equal(first[part], second[part]) for part in rows)

    def _file(self, name: str):
        return self._opened[self._files[self._stored[name]]]

    def _slice(self, name: str):
        return self._file(name).get_slice(self._stored[name])


def _listed(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Return the file that lists the tensors, and of an index also which file holds each."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if not single.exists():
            raise TwlaError(_nothing_to_read(folder))
        return single, {}
    promised = {name: folder / file for name, file in _weight_map(index).items()}
    if single.exists() and single not in promised.values():
        raise TwlaError(
            f"{folder}: holds both {SINGLE} and {INDEX}, which does not name it; keep one of them"
        )
    return index, promised


def indexed_files(folder: Path) -> list[str]:
    """Return the names of the files that the folder's index lists.

    Raises:
      TwlaError: the index cannot be read, or names files elsewhere.
    """
    return sorted(set(_weight_map(folder / INDEX).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, by name."""
    content = read_json(index)
    if not content.get("weight_map"):
        raise TwlaError(f"{index}: 'weight_map' is missing")
    check_values(content, {"weight_map": mapping(text(_LONGEST_NAME))}, str(index))
    for file in content["weight_map"].values():
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise TwlaError(f"{index}: {file!r} is not the name of a file in this folder")
        if len(file.encode(errors="surrogatepass")) > _LONGEST_NAME:
            raise TwlaError(f"{index}: {file[:20]!r}… is longer than the name of a file can be")
    return content["weight_map"]


def _nothing_to_read(folder: Path) -> str:
    pickled = [name for name in _PICKLED if (folder / name).exists()]
    if pickled:
        return (
            f"{folder / pickled[0]}: pickled weights are not read, since loading them may run code;"
            " convert the model to safetensors"
        )
    return f"{folder}: neither {SINGLE} nor {INDEX} is there"


def _refuse_quantized(files: dict[str, Path], packed: Collection[str]) -> None:
    for name, path in files.items():
        for ending, tool in _QUANTIZED.items():
            if name.endswith(ending) and ending not in packed:
                raise TwlaError(
                    f"{path}: its weights are quantised already ({tool}, tensor {name!r});"
                    " bring the model in 16 or 32 bits"
                )


def _published_names(files: Collection[str]) -> dict[str, str]:
    """Return the stored name of each tensor by the name it is published under.

    Saved from the inner model, names lack `model.`; inside a model of several modalities, they have more in front.
    """
    if not any(name.startswith("model.layers.") for name in files):
        for prefix in _PREFIXES:
            if any(name.startswith(f"{prefix}layers.") for name in files):
                return {_renamed(name, prefix): name for name in files}
    return {name: name for name in files}


def _renamed(name: str, prefix: str) -> str:
    if name.endswith("lm_head.weight"):
        return name.removeprefix("language_model.")
    return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def _open(path: Path):
    if not path.exists():
        raise TwlaError(f"{path}: this part of the model is missing")
    require_file(path)
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TwlaError(f"{path}: cut short, or not a safetensors file ({reason})") from error
