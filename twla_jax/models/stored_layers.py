"""Leaves the parameters of all blocks in files: one layer is read when its turn comes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from twla_jax.models.blocks import ChainBlock
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace


class StoredLayers:
    """An array `[layers, ...]` in files. An index reads one layer; `numpy.asarray` reads all of them.

    It stands where a parameter's array does, in a decoder whose other leaves are arrays.
    """

    def __init__(self, read: Callable[[int], np.ndarray], shape: tuple[int, ...], dtype: np.dtype):
        """Describe the array; nothing is read yet.

        Args:
          read: returns a layer, `shape[1:]`, from its index; called from several threads.
          shape: of the whole, layers first.
          dtype: of what `read` returns.
        """
        self._read = read
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Return the bytes that the whole would take in memory."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if not isinstance(index, slice):
            return self._read(range(len(self))[index])
        layers = range(len(self))[index]
        result = np.empty((len(layers), *self.shape[1:]), self.dtype)
        for slot, layer in zip(result, layers, strict=True):
            slot[...] = self._read(layer)
        return result

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self._read, range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        result = self[:]
        return result if dtype is None else result.astype(dtype, copy=False)


def in_files(model: Any) -> bool:
    """Return whether some of a model's layers are in files."""
    return any(isinstance(leaf, StoredLayers) for leaf in jax.tree.leaves(model))


def layer(blocks: ChainBlock, index: int) -> ChainBlock:
    """Return one block of a stack, read from its files where it is in some."""
    return jax.tree.map(lambda leaf: leaf[index], blocks)


def in_turn(blocks: ChainBlock, first: int, count: int) -> Iterator[ChainBlock]:
    """Yield the blocks from `first` to `count` (exclusive), on the host; of those in files, the next is read meanwhile.

    At most two are in memory: the one that was yielded last, as long as the caller holds it, and the one read ahead.
    """
    if not in_files(blocks):
        yield from (layer(blocks, index) for index in range(first, count))
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        ahead = reader.submit(layer, blocks, first) if first < count else None
        for index in range(first, count):
            assert ahead is not None
            block = ahead.result()
            ahead = reader.submit(layer, blocks, index + 1) if index + 1 < count else None
            yield block
            del block


def without_blocks[M: Decoder](model: M) -> M:
    """Return the same model with no layer: its embedding, final norm and head, to be given to a compiled function."""
    none = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape[1:]), leaf.dtype), model.blocks)
    return replace(model, blocks=none)
