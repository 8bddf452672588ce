"""Emulates a GPU's blocks of threads, their memory and the copy engine for `emulated_threads`; all threads go in step.

Blocks of a cluster are rows of the arrays. Warps of a GPU do not go in step: none may read shared memory that another
has written, or write what another has touched, before both have passed a barrier.
"""

import dataclasses
import math

import ml_dtypes
import numpy as np

WARP = 32
_SEVERAL = -2  # stands for several warps; lower numbers for several of one warpgroup


class Machine:
    """Holds blocks of threads with their shared memory, and which threads are active."""

    def __init__(self, threads: int, blocks: int = 1, memory: int = 232448):
        self.shape = (blocks, threads)
        # Random, so that reading what was never written shows.
        self.memory = np.random.default_rng(0).integers(0, 256, (blocks, memory), np.uint8)
        self.used = 0
        self.masks = [np.ones(self.shape, bool)]
        self.copies, self.batches = [], []  # that threads have started, and not yet waited for
        # For every byte: the number of barriers before it was last read and written, and by which warp.
        self.met = 0
        self.begun = blocks == 1
        self.reads, self.writes = (np.full((2, blocks, memory), -1) for _ in range(2))

    @property
    def blocks(self):
        return np.broadcast_to(np.arange(self.shape[0])[:, None], self.shape)

    @property
    def threads(self):
        return np.broadcast_to(np.arange(self.shape[1]), self.shape)

    @property
    def warps(self):
        return self.blocks * self.shape[1] + self.threads // WARP

    def check(self, blocks, places, *, writes, against):
        """Assert that what `against` noted since the last barrier, if anything, was by the same warp; and note this."""
        warps = np.broadcast_to(self.warps[self.masks[-1]][:, None], places.shape)
        when, by = against[:, blocks, places]
        assert not ((when == self.met) & (by != warps)).any(), "no barrier between two warps"
        noted = self.writes if writes else self.reads
        others = (noted[0, blocks, places] == self.met) & (noted[1, blocks, places] != warps)
        assert not (others.any() and writes), "two warps write the same, with no barrier between them"
        noted[0, blocks, places] = self.met
        of_one = _warpgroup(noted[1, blocks, places]) == warps // 4
        together = np.where(of_one, _SEVERAL - 1 - warps // 4, _SEVERAL)
        noted[1, blocks, places] = np.where(others, together, warps)

    def read_by_all(self, ref):
        """Note a read by all threads, as products of whole warpgroups do."""
        at, size = int(ref.start), math.prod(ref.shape) * ref.dtype.itemsize
        assert (self.writes[0, :, at : at + size] < self.met).all()
        self.reads[0, :, at : at + size], self.reads[1, :, at : at + size] = self.met, _SEVERAL

    def copied(self, target, block, thread):
        """Check a copy into shared memory: a warpgroup may overwrite what only it has touched."""
        at = int(self.spread(target.start)[block, thread])
        places = slice(at, at + math.prod(target.shape) * target.dtype.itemsize)
        own = self.warps[block, thread] // 4
        for noted in (self.reads, self.writes):
            when, by = noted[:, block, places]
            assert not ((when == self.met) & (_warpgroup(by) != own)).any(), (
                "another warpgroup still uses this memory"
            )

    def allocate(self, shape, dtype, *, swizzled=False):
        """Return a reference to new shared memory."""
        at = self.used
        self.used = at + -(-math.prod(shape) * np.dtype(dtype).itemsize // 1024) * 1024
        assert self.used <= self.memory.shape[1]
        return Shared(at, tuple(shape), np.dtype(dtype), swizzled)

    def spread(self, value):
        return np.broadcast_to(np.asarray(value), self.shape)


def _warpgroup(by):
    return np.where(by >= 0, by // 4, np.where(by < _SEVERAL, _SEVERAL - 1 - by, -1))


def start(threads, blocks=1, **axes):
    """Start and return a new machine; `axes` are the indices of the grid's block."""
    global machine
    machine = Machine(threads, blocks)
    machine.axes = {"split": machine.blocks, "warpgroup": machine.threads // 128, **axes}
    return machine


@dataclasses.dataclass(frozen=True)
class Slice:
    """Stands for `pl.ds`."""

    start: object
    size: int


@dataclasses.dataclass(frozen=True)
class Shared:
    """Refers to shared memory from an address on, which may be another for each thread."""

    start: object
    shape: tuple
    dtype: np.dtype
    swizzled: bool = False

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        """Index leading axes by a number, or by an array of one for each thread; the last index may be a slice.

        So may the index before it, if it takes everything and leaves one piece of memory.
        """
        start, kept = self.start, ()
        index = index if isinstance(index, tuple) else (index,)
        for axis, each in enumerate(index):
            if isinstance(each, slice):
                rest, size = index[axis + 1], self.shape[axis + 1]
                assert self.shape[axis] == 1 or rest.size == size
                kept, each = self.shape[axis : axis + 1], 0
            if isinstance(each, Slice):
                kept, each = (*kept, each.size), each.start
            start = start + np.asarray(each) * (self.dtype.itemsize * math.prod(self.shape[axis + 1 :]))
        return dataclasses.replace(self, start=start, shape=kept + self.shape[len(index) :])

    def view(self, block, thread):
        """Return what a thread sees, as bytes."""
        at = int(machine.spread(self.start)[block, thread])
        return machine.memory[block, at : at + math.prod(self.shape) * self.dtype.itemsize]


def copy(source, target, _):
    """Copy for each warpgroup as the copy engine does: zeros past the end, and chunks of 16 bytes swizzled."""
    for block in range(machine.shape[0]):
        for thread in range(0, machine.shape[1], 128):
            if machine.masks[-1][block, thread]:
                data = np.zeros(target.shape, source.array.dtype)
                part = source.window(block, thread)
                data[tuple(slice(size) for size in part.shape)] = part
                data = data.view(np.uint8)
                if target.swizzled:
                    rows = np.arange(data.shape[-2])[:, None]
                    data = data.reshape(-1, len(rows), 8, 16)[:, rows, np.arange(8) ^ rows % 8]
                target.view(block, thread)[:] = data.reshape(-1)
                machine.copied(target, block, thread)


def unswizzled(ref, block=0):
    """Return a bf16 matrix from tiles of 8 rows, as wide as their swizzle."""
    rows, columns = ref.shape
    width = next(size for size in (128, 64, 32) if 2 * columns % size == 0)
    chunks = width // 16
    tiles = ref.view(block, 0).reshape(rows // 8, -1, 8, chunks, 16)
    row = np.arange(8)
    rotated = np.arange(chunks) ^ (row[:, None] // (128 // width)) % chunks
    tiles = tiles[:, :, row[:, None], rotated]
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows, -1).view(ml_dtypes.bfloat16)


class OfArray:
    """Refers to its `array`."""

    @property
    def at(self):
        return self

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype


@dataclasses.dataclass(frozen=True)
class Global(OfArray):
    """Refers to an array in global memory."""

    array: np.ndarray

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(each, Slice) or np.ndim(each) for each in index):
            if len(index) == self.array.ndim and not any(isinstance(each, Slice | slice) for each in index):
                return self.array[index]
            return Window(self.array, index)
        part = self.array[tuple(int(each) for each in index)]
        return Global(part) if part.ndim else part


@dataclasses.dataclass(frozen=True)
class Window:
    """Refers to a piece of an array in global memory, which may be another for each thread."""

    array: np.ndarray
    index: tuple

    @property
    def at(self):
        return self

    @property
    def shape(self):
        assert not any(isinstance(each, Slice | slice) for each in self.index)
        return self.array.shape[len(self.index) :]

    @property
    def dtype(self):
        return self.array.dtype

    def __getitem__(self, index):
        return Window(self.array, (*self.index, *(index if isinstance(index, tuple) else (index,))))

    def window(self, block, thread):
        def number(each):
            return int(machine.spread(each)[block, thread])

        return self.array[
            tuple(
                slice(number(each.start), number(each.start) + each.size)
                if isinstance(each, Slice)
                else slice(None)
                if isinstance(each, slice)
                else number(each)
                for each in self.index
            )
        ]


def first(ref):
    """Return where a reference to global memory begins in its array, in numbers, for each thread."""
    index = ref.index if isinstance(ref, Window) else ()
    places = [np.asarray(each) * math.prod(ref.array.shape[i + 1 :]) for i, each in enumerate(index)]
    return machine.spread(sum(places))
