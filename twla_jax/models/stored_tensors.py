"""Changes tensors on their way from a file into a decoder: some families store them in another form."""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """Named tensors in their published layout, `[out, in]` for matrices."""

    def names(self) -> Collection[str]:
        """Return the names of all tensors there are."""
        ...

    def where(self, name: str) -> str:
        """Return the file that holds (or, for an unknown name, should hold) the tensor; for messages."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Return the floating-point type that `read` gives."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that `read` gives, known without reading."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Return the tensor; read when asked for, not kept."""
        ...


class PlusOne:
    """A source whose norms are stored as what they differ from 1 by; the sums come as float32."""

    def __init__(self, source: TensorSource):
        self._source = source
        self.names, self.where, self.shape = source.names, source.where, source.shape

    def dtype(self, name: str) -> np.dtype:
        """Return float32 for norms, else the source's type."""
        return np.dtype(np.float32) if _is_norm(name) else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Return the tensor, of norms `1 + w`."""
        tensor = self._source.read(name)
        return 1 + tensor.astype(np.float32) if _is_norm(name) else tensor


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


class Split:
    """A source in which some tensors are several of the decoder's, one above the other."""

    def __init__(self, source: TensorSource, parts: Callable[[str], Mapping[str, tuple[int, int]] | None]):
        """Split the tensors of a source.

        Args:
          source: the tensors as stored.
          parts: from a stored name to the first row and the one after the last of each tensor in it; None where it is
            one as it stands.
        """
        self._source = source
        self._parts: dict[str, tuple[str, tuple[int, int]]] = {}
        self._names: list[str] = []
        for stored in source.names():
            split = parts(stored)
            self._names += [stored] if split is None else list(split)
            if split is not None:
                self._parts |= {name: (stored, rows) for name, rows in split.items()}

    def names(self) -> Collection[str]:
        """Return the names after splitting."""
        return self._names

    def where(self, name: str) -> str:
        """Return the file of the tensor, or of the one it is a part of."""
        return self._source.where(self._parts[name][0] if name in self._parts else name)

    def dtype(self, name: str) -> np.dtype:
        """Return the stored type."""
        return self._source.dtype(self._parts[name][0] if name in self._parts else name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the part; the last one's tells if there are more rows or fewer than all parts have."""
        if name not in self._parts:
            return self._source.shape(name)
        stored, (first, last) = self._parts[name]
        rows, *others = self._source.shape(stored)
        ends = max(rows_of[1] for _, rows_of in self._parts.values() if _ == stored)
        return rows - first if last == ends else last - first, *others

    def read(self, name: str) -> np.ndarray:
        """Return the tensor, or its rows of a stored one."""
        if name not in self._parts:
            return self._source.read(name)
        stored, (first, last) = self._parts[name]
        return self._source.read(stored)[first:last]
