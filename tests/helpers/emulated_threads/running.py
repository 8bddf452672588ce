"""Runs kernels written with these words, block by block."""

import sys
import types

import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from helpers import emulated_machine, emulated_threads
from helpers.emulated_machine import Global, Slice, copy, start
from helpers.emulated_threads.carried import Values
from helpers.emulated_threads.scalars import select
from helpers.emulated_threads.together import when


def kernel_modules():
    """Return every imported module below `twla_jax.ops` that has code of GPU kernels."""
    found = []
    for name, module in sys.modules.items():
        inside = name.startswith("twla_jax.ops.hopper.") and not name.startswith(
            "twla_jax.ops.hopper.threads"
        )
        if inside or (name.startswith("twla_jax.ops.") and name.rpartition(".")[2].startswith("gpu")):
            found.append(module)
    return found


def emulate(monkeypatch):
    """Make all modules of GPU kernels use these words instead of a GPU's, and Python's loops."""

    def chosen(mask, new, old):
        if isinstance(new, tuple):
            return tuple(chosen(mask, *pair) for pair in zip(new, old, strict=True))
        return Values(select(mask, *pair) for pair in zip(new, old, strict=True))

    def loop(start, stop, step, carry):
        stop = emulated_machine.machine.spread(stop)
        for i in range(int(start), int(stop.max())):
            with when(i < stop):
                carry = chosen(i < stop, step(i, carry), carry)
        return carry

    def axis_index(name):
        return emulated_machine.machine.axes[name]

    for module in kernel_modules():
        for name in ("threads", "Real", "Word"):
            if hasattr(module, name):
                emulated = emulated_threads if name == "threads" else getattr(emulated_threads, name)
                monkeypatch.setattr(module, name, emulated)
        if hasattr(module, "lax"):
            fake = types.SimpleNamespace(
                div=np.floor_divide, rem=np.remainder, fori_loop=loop, axis_index=axis_index
            )
            monkeypatch.setattr(module, "lax", fake)


def scratch(kind):
    """Return what a kernel gets for a type of `plgpu`'s, or for each of several."""
    if isinstance(kind, dict):
        return {name: scratch(each) for name, each in kind.items()}
    if isinstance(kind, list):
        return [scratch(each) for each in kind]
    if isinstance(kind, plgpu.RefUnion):
        first = emulated_machine.machine.used
        parts, ends = [], []
        for part in kind.refs:
            emulated_machine.machine.used = first
            parts.append(scratch(part))
            ends.append(emulated_machine.machine.used)
        emulated_machine.machine.used = max(ends)
        return parts
    if isinstance(kind, plgpu.Barrier):
        return Barriers()
    return emulated_machine.machine.allocate(
        kind.shape, kind.dtype, swizzled=bool(kind.transforms) and kind.dtype == np.uint8
    )


def emulate_kernel(monkeypatch, pl):
    """Make `plgpu.kernel` run its blocks one after the other, and copies at once."""

    def kernel(body, *, out_type, grid, grid_names, num_threads, scratch_types, **_):
        def call(*inputs):
            refs = [Global(np.array(each)) for each in inputs]
            several = isinstance(out_type, tuple)
            out = [Global(_unwritten(each)) for each in (out_type if several else (out_type,))]
            for block in range(grid[0]):
                start(128 * num_threads, **{grid_names[0]: block})
                body(*refs, *out, **scratch(scratch_types))
            return tuple(each.array for each in out) if several else out[0].array

        return call

    def when_called(condition):
        def run(function):
            with when(emulated_machine.machine.spread(condition)):
                function()

        return run

    def looped(start, stop):
        def run(function):
            stops = emulated_machine.machine.spread(stop)
            for i in range(start, int(stops.max())):
                with when(i < stops):
                    function(i)

        return run

    monkeypatch.setattr(plgpu, "kernel", kernel)
    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", copy)
    monkeypatch.setattr(plgpu, "barrier_wait", lambda _: None)
    monkeypatch.setattr(pl, "when", when_called)
    monkeypatch.setattr(pl, "loop", looped)
    monkeypatch.setattr(pl, "ds", Slice)


def _unwritten(kind):
    """Return an array that shows if it is read: NaN, or an integer that no code or sum has."""
    integer = np.issubdtype(kind.dtype, np.integer)
    return np.full(kind.shape, np.iinfo(kind.dtype).min if integer else np.nan, kind.dtype)


class Barriers:
    """Stands for barriers; copies are done when they begin, so there is nothing to wait for."""

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return self
