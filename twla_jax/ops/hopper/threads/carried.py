"""Carries values of a thread through Pallas from one function to the next."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from twla_jax.ops.hopper.threads.scalars import Real, Word

# Its annotations describe functions as Mosaic sees them, not as Pallas does.
on_threads: Any = plgpu.inline_mgpu


def splat_word(array: mgpu.FragmentedArray) -> Word:
    """Return the integer that all threads were given."""
    return Word(array.registers.flat[0])


def per_thread(count: int):
    """Return the layout in which Pallas carries `count` 32-bit values of a thread from one function to the next."""
    return plgpu.Layout.WG_STRIDED((128 * count,), vec_size=1)


def values(count: int, dtype):
    """Return the return type of a function that returns `as_array` of `count` values."""
    return plgpu.ShapeDtypeStruct((128 * count,), dtype, layout=per_thread(count))


def as_array(values: Sequence["Word | Real"]) -> mgpu.FragmentedArray:
    """Return values of a thread in the layout `per_thread`."""
    registers = np.empty(len(values), dtype=object)
    for i, each in enumerate(values):
        registers[i] = vector.broadcast(ir.VectorType.get((1,), each.value.type), each.value)
    signed = True if isinstance(values[0], Word) else None
    layout = per_thread(len(values)).to_mgpu()
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def words(array: mgpu.FragmentedArray) -> list[Word]:
    """Return the integers that `as_array` was given."""
    return [Word(each) for each in _register_values(array)]


def reals(array: mgpu.FragmentedArray) -> list[Real]:
    """Return the floats that `as_array` was given, or a thread's numbers of an array in another layout."""
    return [Real(each) for each in _register_values(array)]


def bfloat16_pairs(array: mgpu.FragmentedArray) -> list[Word]:
    """Return a thread's bf16 numbers of an array, two to a word, as they lie in registers."""
    return [Word(utils.bitcast(each, ir.IntegerType.get_signless(32))) for each in array.registers.flat]


def _register_values(array: mgpu.FragmentedArray) -> list[ir.Value]:
    return [
        vector.extract(each, dynamic_position=[], static_position=[i])
        for each in array.registers.flat
        for i in range(ir.VectorType(each.type).shape[0])
    ]
