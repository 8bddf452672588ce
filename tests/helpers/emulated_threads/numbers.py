"""Computes what single instructions do."""

import ml_dtypes
import numpy as np

from helpers import emulated_machine
from helpers.emulated_threads.scalars import Real, Word, pack_bfloat16, unpack_bfloat16

WHOLE = 1.5 * 2**23


def multiply_halves(a, b, so_far):
    halves = np.ascontiguousarray(a.value)[..., None].view(np.int16).astype(np.int64)
    bytes_ = np.ascontiguousarray(b.value)[..., None].view(np.int8)[..., :2]
    return so_far + Word((halves * bytes_).sum(-1))


def multiply_bytes(a, b, so_far):
    """Multiply fragments as in the manual: lane 4g + t has rows g and g + 8 of A and C, and column g of B."""
    warps = (emulated_machine.machine.shape[0], -1, 8, 4)
    unsigned = np.stack([each.value.reshape(warps) for each in a], -1)[..., None].view(np.uint8)
    signed = np.stack([each.value.reshape(warps) for each in b], -1)[..., None].view(np.int8)
    blocks, count = unsigned.shape[:2]
    left = np.zeros((blocks, count, 16, 32), np.float32)  # exact for these bytes
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
        out.append(each + Word(part.astype(np.int64).reshape(emulated_machine.machine.shape)))
    return out


def multiply_16_bits(a, b, so_far, *, bfloat16):
    """Multiply fragments as in the manual: lane 4g + t has rows g and g + 8 of A and C, and column g of B."""
    warps = (emulated_machine.machine.shape[0], -1, 8, 4)
    kind = ml_dtypes.bfloat16 if bfloat16 else np.float16
    left, right = (
        np.stack([each.value.reshape(warps) for each in of], -1)[..., None].view(kind).astype(np.float32)
        for of in (a, b)
    )
    blocks, count = left.shape[:2]
    rows = np.zeros((blocks, count, 16, 16), np.float32)
    columns = np.zeros((blocks, count, 16, 8), np.float32)
    for t in range(4):
        for half in range(2):
            places = slice(8 * half + 2 * t, 8 * half + 2 * t + 2)
            for i in range(2):
                rows[:, :, 8 * i : 8 * i + 8, places] = left[:, :, :, t, 2 * half + i]
            columns[:, :, places] = right[:, :, :, t, half].swapaxes(-1, -2)
    with np.errstate(all="ignore"):
        product = rows @ columns
    return [
        each + Real(product[:, :, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2].reshape(each.value.shape))
        for i, each in enumerate(so_far)
    ]


def least_bfloat16(one, other):
    return _by_halves(Real.least, one, other)


def most_bfloat16(one, other):
    return _by_halves(Real.most, one, other)


def multiply_bfloat16(one, other):
    with np.errstate(all="ignore"):
        return _by_halves(lambda a, b: a * b, one, other)


def _by_halves(choose, one, other):
    halves = zip(unpack_bfloat16(one), unpack_bfloat16(other), strict=True)
    return pack_bfloat16(*(choose(*pair) for pair in halves))


def eight_reals(found):
    if len(found) == 8:
        return [each.real() for each in found]
    return [half for pair in found for half in unpack_bfloat16(pair)]


def power_of_two(value):
    with np.errstate(all="ignore"):
        return Real(np.exp2(value.value))


def exponential(value):
    with np.errstate(all="ignore"):
        return Real(np.exp(value.value))


def logarithm(value):
    with np.errstate(all="ignore"):
        return Real(np.log2(value.value))


def reciprocal(value):
    """Return 1 / value; a result too small for a normal number is zero."""
    with np.errstate(all="ignore"):
        found = 1 / value.value
    return Real(
        np.where(np.abs(found) < np.finfo(np.float32).tiny, np.copysign(0, found), found).astype(np.float32)
    )


def reciprocal_root(value):
    return Real(1 / np.sqrt(value.value))


def nearest(value):
    return Real(np.rint(value.value))


def signed_bytes(word):
    values = np.ascontiguousarray(word.value)[..., None].view(np.int8)
    return [Real(values[..., i].astype(np.float32)) for i in range(4)]


def float16_bytes(word):
    halves = [each.value.astype(np.float16).view(np.uint16) for each in signed_bytes(word)]
    return tuple(Word(halves[i] | halves[i + 1].astype(np.uint32) << 16) for i in (0, 2))


def permute(one, other, order):
    found = np.stack([Word(each).value for each in (one, other)], -1).view(np.uint8)
    chosen = [found[..., order >> 4 * i & 7] for i in range(4)]
    return Word(np.ascontiguousarray(np.stack(chosen, -1)).view(np.uint32)[..., 0])


def pack_bytes(values):
    parts = [each.value.astype(np.int8) for each in values]
    return Word(np.stack(parts, -1).view(np.uint32)[..., 0])


def sum_of_bytes(value, so_far=0):
    total = value.value[..., None].copy().view(np.int8).sum(-1, dtype=np.int64)
    return Word(so_far) + Word(total)
