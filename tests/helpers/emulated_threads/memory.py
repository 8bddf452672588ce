"""Reads and writes shared and global memory of `emulated_machine`."""

import math

import numpy as np

from helpers import emulated_machine
from helpers.emulated_threads.scalars import Real, Word
from helpers.emulated_threads.together import when


def readable(x):
    return x


def shape(ref):
    return list(ref.shape)


def address(ref):
    return Word(ref.start)


def _read(blocks, at, count):
    """Return bytes; for threads that are not active, any."""
    places = at.value.astype(np.int64)[..., None] + np.arange(count)
    active = emulated_machine.machine.masks[-1]
    assert (places[active] < emulated_machine.machine.memory.shape[1]).all()
    assert (at.value[active] % min(count, 16) == 0).all()
    blocks = np.broadcast_to(blocks, emulated_machine.machine.shape)[..., None]
    emulated_machine.machine.check(
        blocks[active], places[active], writes=False, against=emulated_machine.machine.writes
    )
    return emulated_machine.machine.memory[blocks, np.where(active[..., None], places, 0)]


def _write(at, data, blocks=None):
    active = emulated_machine.machine.masks[-1]
    count = data.shape[-1]
    assert (at.value[active] % count == 0).all()
    places = at.value.astype(np.int64)[active][:, None] + np.arange(count)
    blocks = (emulated_machine.machine.blocks if blocks is None else blocks)[active][:, None]
    emulated_machine.machine.check(blocks, places, writes=True, against=emulated_machine.machine.reads)
    emulated_machine.machine.memory[blocks, places] = data[active]


def _as_words(data):
    parts = np.ascontiguousarray(data).view(np.uint32)
    return [Word(parts[..., i]) for i in range(parts.shape[-1])]


def _as_bytes(each):
    return np.stack([np.ascontiguousarray(each.value).view(np.uint32)], -1).view(np.uint8)


def load(at, count=1, *, offset=0):
    return _as_words(_read(emulated_machine.machine.blocks, at + offset, 4 * count))


def load_short(at, *, offset=0):
    return Word(_read(emulated_machine.machine.blocks, at + offset, 2).view(np.uint16)[..., 0])


def store(at, *each, offset=0):
    _write(at + offset, np.concatenate([_as_bytes(value) for value in each], -1))


def store_byte(at, value, *, offset=0, condition=True):
    with when(True if condition is None else condition):
        _write(at + offset, _as_bytes(value)[..., :1])


def load_matrices(at):
    """Return four matrices: row r of matrix i is at lane 8i + r's address; lane l gets word l % 4 of row l / 4."""
    rows = (
        _read(emulated_machine.machine.blocks, at, 16)
        .view(np.uint32)
        .reshape(*emulated_machine.machine.shape[:1], -1, 4, 8, 4)
    )
    return [Word(rows[:, :, i].reshape(emulated_machine.machine.shape)) for i in range(4)]


def _global(ref, offset, count, condition=None):
    """Return the array's bytes, those that threads address, and which threads are active."""
    active = (
        emulated_machine.machine.masks[-1]
        if condition is None
        else emulated_machine.machine.masks[-1] & condition
    )
    data = ref.array.reshape(-1).view(np.uint8)
    assert np.shares_memory(data, ref.array)
    places = offset.value.astype(np.int64)[..., None] + np.arange(count)
    assert (places[active] < math.prod(ref.shape) * ref.dtype.itemsize).all()
    assert (offset.value[active] % count == 0).all()
    return data, places + emulated_machine.first(ref)[..., None] * ref.dtype.itemsize, active


def _store_global(ref, offset, values):
    """Store the bytes of every active thread."""
    data, places, active = _global(ref, offset, values.shape[-1])
    data[places[active]] = values[active]


def load_global(ref, offset, count=1, *, condition=None):
    data, places, active = _global(ref, offset, 4 * count, condition)
    return _as_words(
        np.where(active[..., None], data[np.where(active[..., None], places, 0)], 0).astype(np.uint8)
    )


def copy(at, ref, offset, count, *, condition):
    """Read at once, but write only when the copy is waited for."""
    machine = emulated_machine.machine
    found = load_global(ref, offset, count, condition=condition)
    machine.copies.append((machine.masks[-1] & condition, at, found))


def end_copies():
    machine = emulated_machine.machine
    machine.batches.append(machine.copies)
    machine.copies = []


def wait_for_copies(count):
    machine = emulated_machine.machine
    while len(machine.batches) > count:
        for mask, at, found in machine.batches.pop(0):
            machine.masks.append(mask)
            store(at, *found)
            machine.masks.pop()


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


def receive(ref, offsets, tag):
    """Return the words, which must have the tag: all threads go in step, so nothing can arrive while one waits."""
    found = [each for offset in offsets for each in load_global(ref, offset, 4)]
    active = emulated_machine.machine.masks[-1]
    for each in found:
        assert (((each.value ^ tag.value) < 0x10000) | ~active).all(), "nobody sends it"
    return found


def bits(ref):
    return 8 * ref.dtype.itemsize


def rounded(value, ref):
    return value if bits(ref) == 32 else value.to_bfloat16()


def address_of_block(at, block):
    return Word(at), block


def store_of_block(there, value, *, offset=0):
    at, block = there
    assert emulated_machine.machine.begun, "the other block may not have begun"
    _write(at + offset, _as_bytes(value), block.value.astype(np.int64))
