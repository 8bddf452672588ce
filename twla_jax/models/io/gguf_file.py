"""Reads the container of GGUF files: metadata, and tensors as they are stored.

Reads a vocabulary of many thousand entries in a fraction of the time that `gguf.GGUFReader` takes, and names the tensor
at which a file was cut short. A model split over several files is read as one.
"""

import dataclasses
import enum
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.json_files import require_file
from twla_jax.schema import check_values, integer, one_of

_VERSIONS = (2, 3)
_MOST_NESTED = 4  # arrays within arrays
_MOST_AXES = 4
_ALIGNMENT = "general.alignment"
_CHECKS = {
    _ALIGNMENT: one_of(*(2**power for power in range(21))),
    "split.count": integer(0, 65535),
    "split.no": integer(0, 65535),
    "split.tensors.count": integer(0, 2**32 - 1),
}
_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = int(gguf.GGUFValueType.STRING), int(gguf.GGUFValueType.ARRAY)
_SCALARS = {  # layout by value type; strings and arrays are the two that are missing
    gguf.GGUFValueType.UINT8: struct.Struct("<B"),
    gguf.GGUFValueType.INT8: struct.Struct("<b"),
    gguf.GGUFValueType.UINT16: struct.Struct("<H"),
    gguf.GGUFValueType.INT16: struct.Struct("<h"),
    gguf.GGUFValueType.UINT32: struct.Struct("<I"),
    gguf.GGUFValueType.INT32: struct.Struct("<i"),
    gguf.GGUFValueType.FLOAT32: struct.Struct("<f"),
    gguf.GGUFValueType.BOOL: struct.Struct("<?"),
    gguf.GGUFValueType.UINT64: struct.Struct("<Q"),
    gguf.GGUFValueType.INT64: struct.Struct("<q"),
    gguf.GGUFValueType.FLOAT64: struct.Struct("<d"),
}


class NewerType(enum.IntEnum):
    """Types of tensors that the gguf package may not know."""

    Q2_0 = 42


_BLOCKS: dict[Any, tuple[int, int]] = {NewerType.Q2_0: (64, 18)}  # values and bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: `shape` in the usual order (rows first), `start` in bytes from the beginning of `path`."""

    shape: tuple[int, ...]
    kind: "gguf.GGMLQuantizationType | NewerType"
    start: int
    size: int
    path: Path


class GgufFile:
    """A GGUF file, opened once for its settings, its tokenizer and its tensors; or all the parts of a split one.

    Attributes:
      path: the file, of a split one the first part.
      metadata: values by key, as Python objects; of a split one those of the first part.
      tensors: where every tensor lies, by name.
    """

    def __init__(self, path: Path):
        """Read metadata and the table of tensors.

        Raises:
          TwlaError: the file or one of its parts is absent, unreadable, cut short or something else.
        """
        self.path = path
        self._bytes: dict[Path, mmap.mmap] = {}
        self.metadata, self.tensors = self._open(path)
        if self.get("split.count", 0) > 1:
            self._read_parts()

    def _read_parts(self) -> None:
        count, named = self.get("split.count"), _PART_NAME.fullmatch(self.path.name)
        if not named or int(named[3]) != count:
            raise TwlaError(
                f"{self.path}: is one of {count} parts, which have to be named …-00001-of-{count:05d}.gguf"
            )
        paths = [
            self.path.with_name(f"{named[1]}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)
        ]
        found: dict[str, StoredTensor] = {}
        for number, path in enumerate(paths):
            metadata, tensors = (self.metadata, self.tensors) if path == self.path else self._open(path)
            if (metadata.get("split.no"), metadata.get("split.count")) != (number, count):
                raise TwlaError(f"{path}: does not say that it is part {number + 1} of {count}")
            if number == 0:
                self.path, self.metadata = path, metadata
            if twice := found.keys() & tensors.keys():
                raise TwlaError(f"{path}: tensor {min(twice)!r} is in another part, too")
            found |= tensors
        if (promised := self.get("split.tensors.count", len(found))) != len(found):
            raise TwlaError(f"{self.path}: the parts have {len(found)} tensors together, not {promised}")
        self.tensors = found

    def _open(self, path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        require_file(path)
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise TwlaError(f"{path}: not a GGUF file")
            self._bytes[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = len(self._bytes[path])
        try:
            metadata, tensors = _read_header(self._bytes[path], path)
        except (struct.error, EOFError) as error:
            raise TwlaError(f"{path}: cut short, it ends within the header") from error
        except (ValueError, OverflowError) as error:
            raise TwlaError(f"{path}: not a readable GGUF file ({error})") from error
        for name, tensor in tensors.items():
            if tensor.start + tensor.size > size:
                raise TwlaError(f"{path}: cut short, tensor {name!r} is not whole")
        return metadata, tensors

    def get(self, key: str, default: Any = None) -> Any:
        """Return a metadata value as a Python object."""
        return self.metadata.get(key, default)

    def require(self, key: str) -> Any:
        """Return a metadata value that must be there."""
        if key not in self.metadata:
            raise TwlaError(f"{self.path}: metadata {key!r} is missing")
        return self.metadata[key]

    def read(self, name: str) -> np.ndarray:
        """Return the tensor's values, float32, dequantised by the gguf package; the file's pages are let go.

        Raises:
          TwlaError: the package cannot dequantise this type.
        """
        tensor = self.tensors[name]
        try:
            return self._values(tensor)
        except (NotImplementedError, ValueError) as error:
            raise TwlaError(
                f"{tensor.path}: tensor {name!r} of type {tensor.kind.name} cannot be read"
            ) from error
        finally:
            _let_go(self._bytes[tensor.path], tensor)

    def _values(self, tensor: StoredTensor) -> np.ndarray:
        stored = np.frombuffer(self._bytes[tensor.path], np.uint8, tensor.size, tensor.start)
        if tensor.kind == gguf.GGMLQuantizationType.F32:
            return stored.view("<f4").reshape(tensor.shape).copy()
        if tensor.kind == gguf.GGMLQuantizationType.F16:
            return stored.view("<f2").reshape(tensor.shape).astype(np.float32)
        if tensor.kind == NewerType.Q2_0:
            return _dequantize_q2_0(stored).reshape(tensor.shape)
        rows = stored.reshape(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind))
        return gguf.dequantize(rows, tensor.kind)


def _let_go(mapped: mmap.mmap, tensor: StoredTensor) -> None:
    """Tell the system that a tensor's pages are not needed again: until then they count as this process's memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        start = tensor.start - tensor.start % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, tensor.start + tensor.size - start)


def _read_header(data: mmap.mmap, path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    cursor = _Cursor(data, 4)
    version = cursor.scalar(_U32)
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, supported are {_VERSIONS}")
    tensor_count, value_count = cursor.scalar(_U64), cursor.scalar(_U64)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"metadata {key!r} is there twice")
        metadata[key] = cursor.value(cursor.scalar(_U32))
    check_values(metadata, _CHECKS, str(path))
    table: dict[str, tuple] = {}
    for _ in range(tensor_count):
        name, axes = cursor.string(), cursor.scalar(_U32)
        if name in table:
            raise ValueError(f"tensor {name!r} is there twice")
        if axes > _MOST_AXES:
            raise ValueError(f"tensor {name!r} has {axes} axes")
        shape = tuple(cursor.scalar(_U64) for _ in range(axes))[::-1]
        table[name] = shape, _kind(cursor.scalar(_U32)), cursor.scalar(_U64)
    alignment = metadata.get(_ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
    data_start = -(-cursor.at // alignment) * alignment
    return metadata, {
        name: StoredTensor(
            shape=shape, kind=kind, start=data_start + offset, size=_byte_size(shape, kind), path=path
        )
        for name, (shape, kind, offset) in table.items()
    }


class _Cursor:
    """Read little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, at: int):
        self._data = data
        self.at = at

    def scalar(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self._data, self.at)
        self.at += layout.size
        return value

    def string(self) -> str:
        (length,) = _U64.unpack_from(self._data, self.at)
        start = self.at + _U64.size
        if start + length > len(self._data):
            raise EOFError
        self.at = start + length
        return self._data[start : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int, nested: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[gguf.GGUFValueType(kind)])
        if nested == _MOST_NESTED:
            raise ValueError("arrays are nested too deeply")
        item_kind, length = self.scalar(_U32), self.scalar(_U64)
        if item_kind == _STRING:
            return [self.string() for _ in range(length)]
        if item_kind == _ARRAY:
            return [self.value(item_kind, nested + 1) for _ in range(length)]
        layout = struct.Struct(f"<{length}{_SCALARS[gguf.GGUFValueType(item_kind)].format[1]}")
        values = layout.unpack_from(self._data, self.at)
        self.at += layout.size
        return list(values)


def _kind(number: int) -> "gguf.GGMLQuantizationType | NewerType":
    try:
        return gguf.GGMLQuantizationType(number)
    except ValueError:
        return NewerType(number)


def _dequantize_q2_0(stored: np.ndarray) -> np.ndarray:
    """Return `d·(q − 1)` of blocks of a float16 d and 64 fields q of two bits, lowest first."""
    blocks = stored.reshape(-1, _BLOCKS[NewerType.Q2_0][1])
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    fields = blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    return scales * (fields.reshape(len(blocks), -1).astype(np.float32) - 1)


def _byte_size(shape: tuple[int, ...], kind: Any) -> int:
    values, size = _BLOCKS.get(kind) or gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % values:
        raise ValueError(f"a tensor of shape {list(shape)} cannot be {kind.name}")
    return math.prod(shape) // values * size
