"""Represents words and floats as arrays with a value for each thread."""

import ml_dtypes
import numpy as np

from helpers import emulated_machine


class _Number:
    """Holds what words and floats share: `_with` applies an operation to both sides."""

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
        self.value = (
            value if value.shape == emulated_machine.machine.shape else emulated_machine.machine.spread(value)
        )

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
        self.value = emulated_machine.machine.spread(
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


def select(condition, one, other):
    return type(one)(np.where(condition, one.value, other.value))


def both(*conditions):
    return np.logical_and.reduce(conditions)


def pack_bfloat16(low, high):
    halves = [each.to_bfloat16().word() for each in (low, high)]
    return Word((halves[0].value >> 16) | (halves[1].value & 0xFFFF0000))


def pack_float16(low, high):
    with np.errstate(over="ignore"):
        halves = [each.value.astype(np.float16).view(np.uint16) for each in (low, high)]
    return Word(halves[0] | halves[1].astype(np.uint32) << 16)


def unpack_bfloat16(pair):
    return (pair << 16).real(), (pair & 0xFFFF0000).real()


word, real = Word, Real
