"""The container of GGUF files: metadata, and tensors as they are stored.

Reads a vocabulary of many thousand entries in a fraction of the time that `gguf.GGUFReader` takes, and names the tensor
at which a file was cut short.
"""

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from twla_jax.errors import TwlaError

_VERSIONS = (2, 3)
_SCALARS = {  # value type → struct format; strings and arrays are the two that are missing
    gguf.GGUFValueType.UINT8: "<B",
    gguf.GGUFValueType.INT8: "<b",
    gguf.GGUFValueType.UINT16: "<H",
    gguf.GGUFValueType.INT16: "<h",
    gguf.GGUFValueType.UINT32: "<I",
    gguf.GGUFValueType.INT32: "<i",
    gguf.GGUFValueType.FLOAT32: "<f",
    gguf.GGUFValueType.BOOL: "<?",
    gguf.GGUFValueType.UINT64: "<Q",
    gguf.GGUFValueType.INT64: "<q",
    gguf.GGUFValueType.FLOAT64: "<d",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: `shape` in the usual order (rows first), `start` in bytes from the beginning of the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int


class GgufFile:
    """A GGUF file, opened once for its settings, its tokenizer and its tensors."""

    def __init__(self, path: Path):
        """Reads metadata and the table of tensors; TwlaError if the file is absent, cut short or something else."""
        self.path = path
        if not path.is_file():
            raise TwlaError(f"{path}: no such file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise TwlaError(f"{path}: not a GGUF file")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header()
        except (struct.error, EOFError) as error:
            raise TwlaError(f"{path}: cut short, it ends within the header") from error
        except ValueError as error:
            raise TwlaError(f"{path}: not a readable GGUF file ({error})") from error
        for name, tensor in self.tensors.items():
            if tensor.start + tensor.size > len(self._bytes):
                raise TwlaError(f"{path}: cut short, tensor {name!r} is not whole")

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object."""
        return self.metadata.get(key, default)

    def require(self, key: str) -> Any:
        """A metadata value that has to be there."""
        if key not in self.metadata:
            raise TwlaError(f"{self.path}: metadata {key!r} is missing")
        return self.metadata[key]

    def read(self, name: str) -> np.ndarray:
        """The tensor's values, float32, dequantised by the gguf package.

        Raises:
          TwlaError: the package cannot dequantise this type.
        """
        tensor = self.tensors[name]
        stored = np.frombuffer(self._bytes, np.uint8, tensor.size, tensor.start)
        try:
            if tensor.kind == gguf.GGMLQuantizationType.F32:
                return stored.view("<f4").reshape(tensor.shape)
            if tensor.kind == gguf.GGMLQuantizationType.F16:
                return stored.view("<f2").reshape(tensor.shape).astype(np.float32)
            rows = stored.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind))
            return gguf.dequantize(rows, tensor.kind)
        except (NotImplementedError, ValueError) as error:
            raise TwlaError(
                f"{self.path}: tensor {name!r} of type {tensor.kind.name} cannot be read"
            ) from error

    def _read_header(self) -> None:
        cursor = _Cursor(self._bytes, 4)
        version = cursor.scalar("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, supported are {_VERSIONS}")
        tensor_count, value_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        table = [
            (
                cursor.string(),
                tuple(cursor.scalar("<Q") for _ in range(cursor.scalar("<I")))[::-1],
                gguf.GGMLQuantizationType(cursor.scalar("<I")),
                cursor.scalar("<Q"),
            )
            for _ in range(tensor_count)
        ]
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        data = -(-cursor.at // alignment) * alignment
        self.tensors = {
            name: StoredTensor(shape=shape, kind=kind, start=data + offset, size=_byte_size(shape, kind))
            for name, shape, kind, offset in table
        }


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, at: int):
        self._data = data
        self.at = at

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        if self.at + length > len(self._data):
            raise EOFError
        self.at += length
        return self._data[self.at - length : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self.string()
        if kind != gguf.GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[gguf.GGUFValueType(kind)])
        item_kind, length = self.scalar("<I"), self.scalar("<Q")
        if item_kind == gguf.GGUFValueType.STRING or item_kind == gguf.GGUFValueType.ARRAY:
            return [self.value(item_kind) for _ in range(length)]
        layout = f"<{length}{_SCALARS[gguf.GGUFValueType(item_kind)][1]}"
        values = struct.unpack_from(layout, self._data, self.at)
        self.at += struct.calcsize(layout)
        return list(values)


def _byte_size(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    values, size = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % values:
        raise ValueError(f"a tensor of shape {list(shape)} cannot be {kind.name}")
    return int(np.prod(shape, dtype=object)) // values * size
