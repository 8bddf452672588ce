"""`gpu_threads` on the CPU: every word is an array with a value for each thread, and all threads go in step.

What one instruction does is modelled after the PTX manual, so that kernels written with such words can be held against
their references without a GPU, on the machine of `emulated_machine`.
"""

import contextlib
import math
import sys
import types

import emulated_machine as here
import ml_dtypes
import numpy as np
from emulated_machine import WARP, Global, Slice, copy, start
from jax.experimental.pallas import mosaic_gpu as plgpu

WHOLE = 1.5 * 2**23


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
        self.value = value if value.shape == here.machine.shape else here.machine.spread(value)

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

    def __rshift__(self, other):
        return Word(self.value.view(np.int32) >> Word(other).value.astype(np.int32))

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
        self.value = here.machine.spread(
            np.asarray(value.value if isinstance(value, Real) else value, np.float32)
        )

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
        stop = here.machine.spread(stop)
        for i in range(int(start), int(stop.max())):
            with when(i < stop):
                carry = chosen(i < stop, step(i, carry), carry)
        return carry

    def axis_index(name):
        return here.machine.axes[name]

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


def memory(kind):
    """What a kernel gets for a type of `plgpu`'s, or for each of several by name."""
    if isinstance(kind, dict):
        return {name: memory(each) for name, each in kind.items()}
    if isinstance(kind, plgpu.RefUnion):
        first = here.machine.used
        parts, ends = [], []
        for part in kind.refs:
            here.machine.used = first
            parts.append(memory(part))
            ends.append(here.machine.used)
        here.machine.used = max(ends)
        return parts
    if isinstance(kind, plgpu.Barrier):
        return Barriers()
    return here.machine.allocate(
        kind.shape, kind.dtype, swizzled=bool(kind.transforms) and kind.dtype == np.uint8
    )


def emulate_kernel(monkeypatch, pl):
    """Makes `plgpu.kernel` run its blocks one after the other, and copies at once."""

    def kernel(body, *, out_type, grid, grid_names, num_threads, scratch_types, **_):
        def call(*inputs):
            refs = [Global(np.array(each)) for each in inputs]
            out = Global(np.full(out_type.shape, np.nan, out_type.dtype))
            for block in range(grid[0]):
                start(128 * num_threads, **{grid_names[0]: block})
                body(*refs, out, **memory(scratch_types))
            return out.array

        return call

    def when_called(condition):
        def run(function):
            with when(here.machine.spread(condition)):
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
    return Word(here.machine.threads)


def barrier(count):
    assert count == here.machine.shape[1]
    here.machine.met += 1


def cluster_arrive():
    pass  # what is written before is not taken to be seen, as others may arrive later


def cluster_wait():
    here.machine.begun = True


def cluster_barrier():
    here.machine.met += 1


def publish():
    pass


@contextlib.contextmanager
def when(condition):
    here.machine.masks.append(here.machine.masks[-1] & condition)
    yield
    here.machine.masks.pop()


def address(ref):
    return Word(ref.start)


def _read(blocks, at, count):
    """Bytes; of threads that take no part, anything."""
    places = at.value.astype(np.int64)[..., None] + np.arange(count)
    active = here.machine.masks[-1]
    assert (places[active] < here.machine.memory.shape[1]).all()
    assert (at.value[active] % min(count, 16) == 0).all()
    blocks = np.broadcast_to(blocks, here.machine.shape)[..., None]
    here.machine.check(blocks[active], places[active], writes=False, against=here.machine.writes)
    return here.machine.memory[blocks, np.where(active[..., None], places, 0)]


def _write(at, data, blocks=None):
    active = here.machine.masks[-1]
    count = data.shape[-1]
    assert (at.value[active] % count == 0).all()
    places = at.value.astype(np.int64)[active][:, None] + np.arange(count)
    blocks = (here.machine.blocks if blocks is None else blocks)[active][:, None]
    here.machine.check(blocks, places, writes=True, against=here.machine.reads)
    here.machine.memory[blocks, places] = data[active]


def _as_words(data):
    parts = np.ascontiguousarray(data).view(np.uint32)
    return [Word(parts[..., i]) for i in range(parts.shape[-1])]


def _as_bytes(each):
    return np.stack([np.ascontiguousarray(each.value).view(np.uint32)], -1).view(np.uint8)


def load(at, count=1, *, offset=0):
    return _as_words(_read(here.machine.blocks, at + offset, 4 * count))


def load_short(at, *, offset=0):
    return Word(_read(here.machine.blocks, at + offset, 2).view(np.uint16)[..., 0])


def store(at, *each, offset=0):
    _write(at + offset, np.concatenate([_as_bytes(value) for value in each], -1))


def store_byte(at, value, *, offset=0, condition=True):
    with when(True if condition is None else condition):
        _write(at + offset, _as_bytes(value)[..., :1])


def load_matrices(at):
    """Matrix i's row r is at the address of lane 8i + r; lane l gets word l % 4 of row l / 4."""
    rows = _read(here.machine.blocks, at, 16).view(np.uint32).reshape(*here.machine.shape[:1], -1, 4, 8, 4)
    return [Word(rows[:, :, i].reshape(here.machine.shape)) for i in range(4)]


def multiply_halves(a, b, so_far):
    halves = np.ascontiguousarray(a.value)[..., None].view(np.int16).astype(np.int64)
    bytes_ = np.ascontiguousarray(b.value)[..., None].view(np.int8)[..., :2]
    return so_far + Word((halves * bytes_).sum(-1))


def multiply_bytes(a, b, so_far):
    """As the manual has the fragments: lane 4g + t has rows g and g + 8 of A and C, and column g of B."""
    warps = (here.machine.shape[0], -1, 8, 4)
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
        out.append(each + Word(part.astype(np.int64).reshape(here.machine.shape)))
    return out


def _global(ref, offset, count, condition=None):
    """The array's bytes, which of them threads mean, and which threads take part."""
    active = here.machine.masks[-1] if condition is None else here.machine.masks[-1] & condition
    data = ref.array.reshape(-1).view(np.uint8)
    assert np.shares_memory(data, ref.array)
    places = offset.value.astype(np.int64)[..., None] + np.arange(count)
    assert (places[active] < math.prod(ref.shape) * ref.dtype.itemsize).all()
    assert (offset.value[active] % count == 0).all()
    return data, places + here.first(ref)[..., None] * ref.dtype.itemsize, active


def _store_global(ref, offset, values):
    """Bytes, of every thread."""
    data, places, active = _global(ref, offset, values.shape[-1])
    data[places[active]] = values[active]


def load_global(ref, offset, count=1, *, condition=None):
    data, places, active = _global(ref, offset, 4 * count, condition)
    return _as_words(
        np.where(active[..., None], data[np.where(active[..., None], places, 0)], 0).astype(np.uint8)
    )


def load_real(ref, index):
    size = ref.dtype.itemsize
    data, places, active = _global(ref, index * size, size)
    found = data[np.where(active[..., None], places, 0)]
    return Real(np.ascontiguousarray(found).view(ref.dtype)[..., 0].astype(np.float32))


def store_real(ref, index, value):
    with np.errstate(all="ignore"):
        number = value.value.astype(ref.dtype)
    _store_global(ref, index * ref.dtype.itemsize, np.ascontiguousarray(number)[..., None].view(np.uint8))


def store_global_words(ref, offset, four):
    _store_global(ref, offset, np.concatenate([_as_bytes(each) for each in four], -1))


def send(ref, offset, value):
    _store_global(ref, offset, _as_bytes(value))


def receive(ref, offset, tag):
    """As all threads go in step, those that wait have missed what is not there yet."""
    found, active = load_global(ref, offset, 4), here.machine.masks[-1]
    for each in found:
        assert (((each.value ^ tag.value) < 0x10000) | ~active).all(), "nobody sends it"
    return found


def bits(ref):
    return 8 * ref.dtype.itemsize


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
    return type(value)(lanes.reshape(here.machine.shape))


def of_lane(value, lane):
    lanes = value.value.reshape(-1, WARP)[:, np.full(WARP, lane)]
    return Real(lanes.reshape(here.machine.shape))


def _over_warp(value, operation):
    warps = operation(value.value.reshape(*here.machine.shape[:1], -1, WARP), -1, keepdims=True)
    return Real(np.repeat(warps, WARP, -1).reshape(here.machine.shape))


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
    assert here.machine.begun, "the other block may not have begun"
    _write(at + offset, _as_bytes(value), block.value.astype(np.int64))
