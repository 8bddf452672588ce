"""Writes safetensors files tensor by tensor, so that no more than one of them is held beside the model."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}
INDEX = "model.safetensors.index.json"
_SHARD = 4 * 10**9  # bytes


class Tensor(NamedTuple):
    """A tensor to write; `make` returns it, an array of that shape and type."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Return its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, and see to it that it is on the disk.

    Args:
      path: of the file.
      tensors: in the order in which they are written; each array is made when its turn comes.
      metadata: what goes under `__metadata__` in the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        kind = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = kind
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.asarray(tensor.make(), order="C")  # `ascontiguousarray` gives numbers an axis
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise AssertionError(f"{tensor.name}: {array.dtype}{array.shape} is not what was announced")
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_model(folder: Path, tensors: Sequence[Tensor], *, shard_bytes: int = _SHARD) -> list[str]:
    """Write `model.safetensors`, or shards with an index where it would be larger than `shard_bytes`.

    Returns:
      The names of the files with tensors.
    """
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(held.nbytes for held in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, {"format": "pt"})
    if len(names) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names
