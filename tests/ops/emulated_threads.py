"""`gpu_threads` on the CPU: every word is an array with a value for each thread, and all threads go in step.

What one instruction does is modelled after the PTX manual, so that kernels written with such words can be held against
their references without a GPU. Blocks of a cluster are rows of the arrays. Warps of a GPU do not go in step: none may
touch shared memory that another has written, or write what another has touched, before both have met at a barrier.
"""

import contextlib
import dataclasses
import math
import sys
import types

import ml_dtypes
import numpy as np

WARP = 32
WHOLE = 1.5 * 2**23
_SEVERAL = -2  # in place of a warp; and less, for several of one warpgroup


class Machine:
    """Blocks of threads with their shared memory, and which threads take part in what happens now."""

    def __init__(self, threads: int, blocks: int = 1, memory: int = 232448):
        self.shape = (blocks, threads)
        # As it may be found: whatever is not written before it is read shows.
        self.memory = np.random.default_rng(0).integers(0, 256, (blocks, memory), np.uint8)
        self.used = 0
        self.masks = [np.ones(self.shape, bool)]
        # Of every byte: how many barriers there had been when it was last read and written, and by which warp.
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
        """That what `against` noted since the last barrier, if anything, was by the same warp; and notes this."""
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
        """As products of whole warpgroups do."""
        at, size = int(ref.start), math.prod(ref.shape) * ref.dtype.itemsize
        assert (self.writes[0, :, at : at + size] < self.met).all()
        self.reads[0, :, at : at + size], self.reads[1, :, at : at + size] = self.met, _SEVERAL

    def copied(self, target, block, thread):
        """A warpgroup may have a copy made to what it touched itself, as its warps wait for each other before."""
        at = int(self.spread(target.start)[block, thread])
        places = slice(at, at + math.prod(target.shape) * target.dtype.itemsize)
        own = self.warps[block, thread] // 4
        for noted in (self.reads, self.writes):
            when, by = noted[:, block, places]
            assert not ((when == self.met) & (_warpgroup(by) != own)).any(), "a warpgroup is not done with it"

    def allocate(self, shape, dtype, *, swizzled=False):
        """A reference to shared memory."""
        at = self.used
        self.used = at + -(-math.prod(shape) * np.dtype(dtype).itemsize // 1024) * 1024
        assert self.used <= self.memory.shape[1]
        return Shared(at, tuple(shape), np.dtype(dtype), swizzled)

    def spread(self, value):
        return np.broadcast_to(np.asarray(value), self.shape)


machine: Machine  # the one that a test made


def _warpgroup(by):
    return np.where(by >= 0, by // 4, np.where(by < _SEVERAL, _SEVERAL - 1 - by, -1))


@dataclasses.dataclass(frozen=True)
class Slice:
    """`pl.ds`."""

    start: object
    size: int


@dataclasses.dataclass(frozen=True)
class Shared:
    """Shared memory from an address on, which may be another for each thread."""

    start: object
    shape: tuple
    dtype: np.dtype
    swizzled: bool = False

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        """Leading indices: each a number, or an array of one for each thread; the last one may be a slice."""
        start, kept = self.start, ()
        index = index if isinstance(index, tuple) else (index,)
        for axis, each in enumerate(index):
            if isinstance(each, Slice):
                kept, each = (each.size,), each.start
            start = start + np.asarray(each) * (self.dtype.itemsize * math.prod(self.shape[axis + 1 :]))
        return dataclasses.replace(self, start=start, shape=kept + self.shape[len(index) :])

    def view(self, block, thread):
        """What a thread sees, as bytes."""
        at = int(machine.spread(self.start)[block, thread])
        return machine.memory[block, at : at + math.prod(self.shape) * self.dtype.itemsize]


def copy(source, target, _):
    """The copy engine, for each warpgroup: zeros where the source ends; chunks of 16 bytes swizzled."""
    for block in range(machine.shape[0]):
        for thread in range(0, machine.shape[1], 128):
            if machine.masks[-1][block, thread]:
                data = np.zeros(target.shape, source.array.dtype)
                part = source.window(block, thread)
                data[tuple(slice(size) for size in part.shape)] = part
                data = data.view(np.uint8)
                if target.swizzled:
                    rows = np.arange(len(data))[:, None]
                    data = data.reshape(len(data), 8, 16)[rows, np.arange(8) ^ rows % 8]
                target.view(block, thread)[:] = data.reshape(-1)
                machine.copied(target, block, thread)


def unswizzled(ref, block=0):
    """A bf16 matrix in tiles of 8 rows, as wide as their swizzle."""
    rows, columns = ref.shape
    width = next(size for size in (128, 64, 32) if 2 * columns % size == 0)
    chunks = width // 16
    tiles = ref.view(block, 0).reshape(rows // 8, -1, 8, chunks, 16)
    row = np.arange(8)
    turned = np.arange(chunks) ^ (row[:, None] // (128 // width)) % chunks
    tiles = tiles[:, :, row[:, None], turned]
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows, -1).view(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Global:
    """An array in global memory."""

    array: np.ndarray

    @property
    def at(self):
        return self

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(each, Slice) or np.ndim(each) for each in index):
            return Window(self.array, index)
        part = self.array[tuple(int(each) for each in index)]
        return Global(part) if part.ndim else part


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of an array in global memory, which may be another for each thread."""

    array: np.ndarray
    index: tuple

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


class _Number:
    """What words and floats have in common: `_with` applies an operation to both sides."""

    def __add__(self, other):
        return self._with(np.add, other)

    def __sub__(self, other):
        return self._with(np.subtract, other)

    def __mul__(self, other):
        return self._with(np.multiply, other)


class Word(_Number):
    def __init__(self, value):
        value = value.value if isinstance(value, Word) else np.asarray(value)
        if value.dtype != np.uint32:
            value = (value.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
        self.value = value if value.shape == machine.shape else machine.spread(value)

    def _with(self, operation, other):
        other = other if isinstance(other, Word) else Word(other)
        with np.errstate(over="ignore"):
            return Word(operation(self.value, other.value))

    def __floordiv__(self, other):
        return self._with(np.floor_divide, other)

    def __mod__(self, other):
        return self._with(np.remainder, other)

    def __and__(self, other):
        return self._with(np.bitwise_and, other)

    def __xor__(self, other):
        return self._with(np.bitwise_xor, other)

    def __lshift__(self, other):
        return self._with(np.left_shift, other)

    def __lt__(self, other):
        return self.value < Word(other).value

    def __ge__(self, other):
        return self.value >= Word(other).value

    def equals(self, other):
        return self.value == Word(other).value

    def least(self, other):
        return self._with(np.minimum, other)

    def real(self):
        return Real(self.value.copy().view(np.float32))

    def converted(self):
        return Real(self.value.copy().view(np.int32).astype(np.float32))


class Real(_Number):
    def __init__(self, value):
        self.value = machine.spread(np.asarray(value.value if isinstance(value, Real) else value, np.float32))

    def _with(self, operation, other):
        with np.errstate(all="ignore"):
            return Real(operation(self.value, Real(other).value))

    def __truediv__(self, other):
        return self._with(np.divide, other)

    def least(self, other):
        return self._with(np.fmin, other)

    def most(self, other):
        return self._with(np.fmax, other)

    def times_plus(self, factor, more):
        with np.errstate(all="ignore"):
            product = self.value.astype(np.float64) * Real(factor).value
            return Real((product + Real(more).value).astype(np.float32))

    def word(self):
        return Word(np.ascontiguousarray(self.value).view(np.uint32))

    def to_bfloat16(self):
        with np.errstate(all="ignore"):
            return Real(self.value.astype(ml_dtypes.bfloat16).astype(np.float32))


def readable(x):
    return x


def emulate(monkeypatch, *modules):
    """Makes the modules use these words instead of a GPU's, and Python's loops."""

    def chosen(mask, new, old):
        if isinstance(new, tuple):
            return tuple(chosen(mask, *pair) for pair in zip(new, old, strict=True))
        return Values(select(mask, *pair) for pair in zip(new, old, strict=True))

    def loop(start, stop, step, carry):
        stop = machine.spread(stop)
        for i in range(int(start), int(stop.max())):
            with when(i < stop):
                carry = chosen(i < stop, step(i, carry), carry)
        return carry

    def axis_index(name):
        return machine.axes[name]

    for module in modules:
        for name in ("threads", "Real", "Word"):
            if hasattr(module, name):
                monkeypatch.setattr(
                    module, name, sys.modules[__name__] if name == "threads" else globals()[name]
                )
        if hasattr(module, "lax"):
            fake = types.SimpleNamespace(
                div=np.floor_divide, rem=np.remainder, fori_loop=loop, axis_index=axis_index
            )
            monkeypatch.setattr(module, "lax", fake)


def emulate_kernel(monkeypatch, pl, plgpu):
    """Makes `plgpu.kernel` run its blocks one after the other, and copies at once."""

    def memory(kind):
        if isinstance(kind, plgpu.RefUnion):
            first = machine.used
            parts, ends = [], []
            for part in kind.refs:
                machine.used = first
                parts.append(memory(part))
                ends.append(machine.used)
            machine.used = max(ends)
            return parts
        if isinstance(kind, plgpu.Barrier):
            return Barriers()
        return machine.allocate(
            kind.shape, kind.dtype, swizzled=bool(kind.transforms) and kind.dtype == np.uint8
        )

    def kernel(body, *, out_type, grid, grid_names, num_threads, scratch_types, **_):
        def call(*inputs):
            refs = [Global(np.array(each)) for each in inputs]
            out = Global(np.full(out_type.shape, np.nan, out_type.dtype))
            for block in range(grid[0]):
                start(128 * num_threads, **{grid_names[0]: block})
                body(*refs, out, **{name: memory(kind) for name, kind in scratch_types.items()})
            return out.array

        return call

    def when_called(condition):
        def run(function):
            with when(machine.spread(condition)):
                function()

        return run

    monkeypatch.setattr(plgpu, "kernel", kernel)
    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", copy)
    monkeypatch.setattr(plgpu, "barrier_wait", lambda _: None)
    monkeypatch.setattr(pl, "when", when_called)
    monkeypatch.setattr(pl, "ds", Slice)


class Barriers:
    """Copies are done when they begin: there is nothing to wait for."""

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return self


def start(threads, blocks=1, **axes):
    """A new machine; `axes` are the indices of the grid's block."""
    global machine
    machine = Machine(threads, blocks)
    machine.axes = {"split": machine.blocks, "warpgroup": machine.threads // 128, **axes}
    return machine


def on_threads(*, arg_types=(), return_type=None):
    del arg_types, return_type
    return lambda function: lambda *arguments: function(None, *arguments)


def per_thread(count):
    return count


def values(count, dtype):
    return count, dtype


class Values(list):
    """What Pallas carries from one function to the next; of 128 threads, by its shape."""

    @property
    def shape(self):
        return (128 * len(self),)


def as_array(array):
    return Values(array)


def words(array):
    return array


def reals(array):
    return array


word, real, splat_word, splat_real = Word, Real, Word, Real


def as_splat(value):
    return value.value


def shape(ref):
    return list(ref.shape)


def select(condition, one, other):
    return type(one)(np.where(condition, one.value, other.value))


def both(*conditions):
    return np.logical_and.reduce(conditions)


def thread():
    return Word(machine.threads)


def barrier(count):
    assert count == machine.shape[1]
    machine.met += 1


def cluster_arrive():
    pass  # what is written before is not taken to be seen, as others may arrive later


def cluster_wait():
    machine.begun = True


def cluster_barrier():
    machine.met += 1


def publish():
    pass


@contextlib.contextmanager
def when(condition):
    machine.masks.append(machine.masks[-1] & condition)
    yield
    machine.masks.pop()


def address(ref):
    return Word(ref.start)


def _read(blocks, at, count):
    """Bytes; of threads that take no part, anything."""
    places = at.value.astype(np.int64)[..., None] + np.arange(count)
    active = machine.masks[-1]
    assert (places[active] < machine.memory.shape[1]).all()
    assert (at.value[active] % min(count, 16) == 0).all()
    blocks = np.broadcast_to(blocks, machine.shape)[..., None]
    machine.check(blocks[active], places[active], writes=False, against=machine.writes)
    return machine.memory[blocks, np.where(active[..., None], places, 0)]


def _write(at, data, blocks=None):
    active = machine.masks[-1]
    count = data.shape[-1]
    assert (at.value[active] % count == 0).all()
    places = at.value.astype(np.int64)[active][:, None] + np.arange(count)
    blocks = (machine.blocks if blocks is None else blocks)[active][:, None]
    machine.check(blocks, places, writes=True, against=machine.reads)
    machine.memory[blocks, places] = data[active]


def _as_words(data):
    parts = np.ascontiguousarray(data).view(np.uint32)
    return [Word(parts[..., i]) for i in range(parts.shape[-1])]


def _as_bytes(each):
    return np.stack([np.ascontiguousarray(each.value).view(np.uint32)], -1).view(np.uint8)


def load(at, count=1, *, offset=0):
    return _as_words(_read(machine.blocks, at + offset, 4 * count))


def load_half(at, *, offset=0):
    return Real(_read(machine.blocks, at + offset, 2).view(np.float16)[..., 0])


def store(at, *each, offset=0):
    _write(at + offset, np.concatenate([_as_bytes(value) for value in each], -1))


def store_byte(at, value, *, offset=0, condition=True):
    with when(True if condition is None else condition):
        _write(at + offset, _as_bytes(value)[..., :1])


def load_matrices(at):
    """Matrix i's row r is at the address of lane 8i + r; lane l gets word l % 4 of row l / 4."""
    rows = _read(machine.blocks, at, 16).view(np.uint32).reshape(*machine.shape[:1], -1, 4, 8, 4)
    return [Word(rows[:, :, i].reshape(machine.shape)) for i in range(4)]


def multiply_bytes(a, b, so_far):
    """As the manual has the fragments: lane 4g + t has rows g and g + 8 of A and C, and column g of B."""
    warps = (machine.shape[0], -1, 8, 4)
    unsigned = np.stack([each.value.reshape(warps) for each in a], -1)[..., None].view(np.uint8)
    signed = np.stack([each.value.reshape(warps) for each in b], -1)[..., None].view(np.int8)
    blocks, count = unsigned.shape[:2]
    left = np.zeros((blocks, count, 16, 32), np.float32)  # which is exact here
    right = np.zeros((blocks, count, 32, 8), np.float32)
    for t in range(4):
        for i in range(4):
            columns = slice(16 * (i // 2) + 4 * t, 16 * (i // 2) + 4 * t + 4)
            left[:, :, 8 * (i % 2) : 8 * (i % 2) + 8, columns] = unsigned[:, :, :, t, i]
        for i in range(2):
            right[:, :, 16 * i + 4 * t : 16 * i + 4 * t + 4] = signed[:, :, :, t, i].swapaxes(-1, -2)
    product = left @ right
    out = []
    for i, each in enumerate(so_far):
        part = product[:, :, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2]
        out.append(each + Word(part.astype(np.int64).reshape(machine.shape)))
    return out


def _global(ref, offset, count, condition=None):
    active = machine.masks[-1] if condition is None else machine.masks[-1] & condition
    data = np.ascontiguousarray(ref.array).view(np.uint8).reshape(-1)
    places = offset.value.astype(np.int64)[..., None] + np.arange(count)
    assert (places[active] < data.size).all()
    assert (offset.value[active] % count == 0).all()
    return data, places, active


def load_global(ref, offset, count=1, *, condition=None):
    data, places, active = _global(ref, offset, 4 * count, condition)
    return _as_words(
        np.where(active[..., None], data[np.where(active[..., None], places, 0)], 0).astype(np.uint8)
    )


def load_real(ref, index):
    size = ref.array.dtype.itemsize
    data, places, active = _global(ref, index * size, size)
    found = data[np.where(active[..., None], places, 0)]
    return Real(np.ascontiguousarray(found).view(ref.array.dtype)[..., 0].astype(np.float32))


def store_real(ref, index, value):
    active = machine.masks[-1]
    flat = ref.array.reshape(-1)
    assert np.shares_memory(flat, ref.array)
    flat[index.value[active]] = value.value[active].astype(ref.array.dtype)


def store_global_words(ref, offset, four):
    active = machine.masks[-1]
    flat = ref.array.view(np.uint32).reshape(-1)
    assert np.shares_memory(flat, ref.array)
    for i, each in enumerate(four):
        flat[offset.value[active] // 4 + i] = each.value[active]


def bits(ref):
    return 8 * ref.array.dtype.itemsize


def rounded(value, ref):
    return value if bits(ref) == 32 else value.to_bfloat16()


def pack_bfloat16(low, high):
    halves = [each.to_bfloat16().word() for each in (low, high)]
    return Word((halves[0].value >> 16) | (halves[1].value & 0xFFFF0000))


def unpack_bfloat16(pair):
    return (pair << 16).real(), (pair & 0xFFFF0000).real()


def bfloat16_pairs(array):
    return array


def least_bfloat16(one, other):
    return _by_halves(Real.least, one, other)


def most_bfloat16(one, other):
    return _by_halves(Real.most, one, other)


def _by_halves(choose, one, other):
    halves = zip(unpack_bfloat16(one), unpack_bfloat16(other), strict=True)
    return pack_bfloat16(*(choose(*pair) for pair in halves))


def eight_reals(found):
    if len(found) == 8:
        return [each.real() for each in found]
    return [half for pair in found for half in unpack_bfloat16(pair)]


def shuffle(value, distance):
    lanes = value.value.reshape(-1, WARP)[:, np.arange(WARP) ^ distance]
    return type(value)(lanes.reshape(machine.shape))


def of_lane(value, lane):
    lanes = value.value.reshape(-1, WARP)[:, np.full(WARP, lane)]
    return Real(lanes.reshape(machine.shape))


def _over_warp(value, operation):
    warps = operation(value.value.reshape(*machine.shape[:1], -1, WARP), -1, keepdims=True)
    return Real(np.repeat(warps, WARP, -1).reshape(machine.shape))


def warp_least(value):
    return _over_warp(value, lambda x, *args, **more: x.min(*args, **more))


def warp_most(value):
    return _over_warp(value, lambda x, *args, **more: x.max(*args, **more))


def power_of_two(value):
    with np.errstate(all="ignore"):
        return Real(np.exp2(value.value))


def exponential(value):
    with np.errstate(all="ignore"):
        return Real(np.exp(value.value))


def reciprocal(value):
    return Real(1 / value.value)


def reciprocal_root(value):
    return Real(1 / np.sqrt(value.value))


def nearest(value):
    return Real(np.rint(value.value))


def signed_bytes(word):
    values = np.ascontiguousarray(word.value)[..., None].view(np.int8)
    return [Real(values[..., i].astype(np.float32)) for i in range(4)]


def pack_bytes(values):
    parts = [each.value.astype(np.int8) for each in values]
    return Word(np.stack(parts, -1).view(np.uint32)[..., 0])


def sum_of_bytes(value, so_far=0):
    total = value.value[..., None].copy().view(np.int8).sum(-1, dtype=np.int64)
    return Word(so_far) + Word(total)


def address_of_block(at, block):
    return Word(at), block


def store_of_block(there, value, *, offset=0):
    at, block = there
    assert machine.begun, "the other block may not have begun"
    _write(at + offset, _as_bytes(value), block.value.astype(np.int64))
