"""Runs a Mosaic GPU kernel's warpgroups on the CPU, each a thread of its own that waits for the others at barriers.

It is for kernels whose warpgroups have different work. Copies into shared memory are done as soon as they are started,
and products as late as the kernel lets them, so that memory freed too early shows. A barrier is that of the PTX manual:
a phase ends with the last arrival and the last byte, and no warpgroup may miss one.
"""

import dataclasses
import sys
import threading
import types

import jax.numpy as jnp
import numpy as np
from jax import lax

from helpers.emulated_machine import OfArray, Slice

TIMEOUT = 60  # seconds, after which a wait fails
_here = threading.local()  # this thread's place: `axes`, and the `sums` of its products


@dataclasses.dataclass(frozen=True)
class Ref(OfArray):
    """Refers to global memory, past whose end there is nothing, or to shared memory of a cluster's blocks."""

    arrays: list
    own: int = 0

    @property
    def array(self):
        return self.arrays[self.own]

    @property
    def T(self):
        return Ref([each.T for each in self.arrays], self.own)

    def __getitem__(self, index):
        def number(each):
            if isinstance(each, Slice):
                return slice(int(each.start), int(each.start) + each.size)
            return each if isinstance(each, slice) else int(each)

        index = tuple(map(number, index if isinstance(index, tuple) else (index,)))
        return Ref([each[index] for each in self.arrays], self.own)

    def __setitem__(self, index, value):
        assert index is ...
        self.array[...] = value


class Barrier:
    """Emulates a barrier of one block."""

    def __init__(self, arrivals, changed):
        self.arrivals, self.changed = arrivals, changed
        self.arrived = self.missing = self.phases = 0
        self.waited, self.broken = {}, False

    def count(self, arrivals, missing=0):
        """Count arrivals, and pieces of copies that are missing."""
        with self.changed:
            self.arrived, self.missing = self.arrived + arrivals, self.missing + missing
            assert self.arrived <= self.arrivals, "more arrivals than the barrier expects"
            if self.arrived == self.arrivals and self.missing == 0:
                self.arrived, self.phases = 0, self.phases + 1
                self.changed.notify_all()

    def wait(self):
        """Wait for the end of the phase after the last one that this warpgroup waited for."""
        group = _here.axes["warpgroup"], _here.axes.get("warp")
        with self.changed:
            before = self.waited.get(group, 0)
            self.changed.wait_for(lambda: self.phases > before or self.broken, TIMEOUT)
            assert self.phases > before, "the other warpgroups never arrived"
            assert self.phases == before + 1, "a phase was missed"
            self.waited[group] = before + 1


@dataclasses.dataclass(frozen=True)
class Barriers:
    """Holds the barriers of all blocks; `arrive` is at this one's or at all."""

    blocks: list
    own: int
    of_cluster: bool

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        """Return one of several; a single one is there under both names."""
        one = [each[int(index)] if isinstance(each, list) else each for each in self.blocks]
        return Barriers(one, self.own, self.of_cluster)

    def wait(self):
        self.blocks[self.own].wait()

    def arrive(self, predicate=None):
        if predicate is not None and not predicate:
            return
        for barrier in self.blocks if self.of_cluster else [self.blocks[self.own]]:
            barrier.count(1)


class Sums:
    """Holds sums of products, some in flight: they read memory when they are waited for."""

    def __init__(self, value):
        self.value, self.in_flight = np.array(value, wider(value)), []

    def wait(self, left):
        while len(self.in_flight) > left:
            codes, ref = self.in_flight.pop(0)
            kind = self.value.dtype
            self.value += np.asarray(codes).astype(kind) @ ref.array.astype(kind)


def wider(value):
    """Return int64 or float64."""
    return np.int64 if jnp.issubdtype(value.dtype, jnp.integer) else np.float64


def run_at_once(function, places, failures):
    """Run a thread for each of the places; then raise the first of the failures that they have noted."""
    running = [threading.Thread(target=function, args=place) for place in places]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]


def emulate(monkeypatch, pl, plgpu):
    """Make `plgpu.kernel` run its clusters one after the other, and all that `gpu_many` calls in it run here."""

    def memory(kind, blocks, changed):
        """Return the memory of all blocks of a cluster; for a dictionary of kinds, a dictionary."""
        if isinstance(kind, dict):
            found = {name: memory(each, blocks, changed) for name, each in kind.items()}
            return lambda own: {name: of_block(own) for name, of_block in found.items()}
        if isinstance(kind, plgpu.Barrier | plgpu.ClusterBarrier):
            of_cluster = isinstance(kind, plgpu.ClusterBarrier)
            arrivals = kind.num_arrivals * (blocks if of_cluster else 1)
            count = np.prod(kind.num_barriers, dtype=int)
            barriers = [[Barrier(arrivals, changed) for _ in range(count)] for _ in range(blocks)]
            if count == 1:
                return lambda own: Barriers(barriers, own, of_cluster)[0]
            return lambda own: Barriers(barriers, own, of_cluster)
        arrays = [np.zeros(kind.shape, kind.dtype) for _ in range(blocks)]
        return lambda own: Ref(arrays, own)

    def kernel(body, *, out_type, grid, grid_names, cluster, cluster_names, num_threads, scratch_types, **_):
        def call(*inputs):
            inputs = [Ref([np.array(each)]) for each in inputs]
            out = Ref([np.full(out_type.shape, np.nan, out_type.dtype)])
            for block in range(grid[0]):
                run_cluster(block, inputs, out)
            return jnp.asarray(out.array)

        def run_cluster(block, inputs, out):
            changed, failures = threading.Condition(), []
            scratch = memory(scratch_types, cluster[0], changed)

            def run(own, group):
                _here.axes = {grid_names[0]: block, cluster_names[0]: own, "warpgroup": group}
                mine = scratch(own)
                try:
                    body(*inputs, out, **mine)
                except BaseException as error:
                    failures.append(error)
                    with changed:  # the others would wait in vain
                        for barrier in barriers_of(mine):
                            barrier.broken = True
                        changed.notify_all()

            places = [(own, group) for own in range(cluster[0]) for group in range(num_threads)]
            run_at_once(run, places, failures)

        sizes.update({grid_names[0]: grid[0], cluster_names[0]: cluster[0]})
        return call

    sizes = {}

    def barriers_of(memory):
        if isinstance(memory, dict):
            return [barrier for each in memory.values() for barrier in barriers_of(each)]
        return np.ravel(memory.blocks) if isinstance(memory, Barriers) else []

    def copy(source, target, barrier, collective_axes=None):
        data = np.zeros(target.shape, target.dtype)
        data[tuple(slice(size) for size in source.shape)] = source.array
        if collective_axes is None:
            target.array[...] = data
            return barrier.arrive()
        # Each block of the cluster loads a piece, for all of them.
        blocks = len(target.arrays)
        barrier.blocks[barrier.own].count(1, blocks)
        part = slice(target.own * len(data) // blocks, (target.own + 1) * len(data) // blocks)
        for array, other in zip(target.arrays, barrier.blocks, strict=True):
            array[part] = data[part]
            other.count(0, -1)

    def write_back(source, target):
        target.array[...] = source.array[tuple(slice(size) for size in target.shape)]

    def multiply(sums, codes, ref):
        sums.in_flight.append((codes, ref))
        _here.sums = sums

    def run_state(function):
        def run(sums):
            function(sums)
            sums.wait(0)
            return jnp.asarray(sums.value, jnp.int32 if sums.value.dtype == np.int64 else jnp.float32)

        return run

    def loop(first, last):
        return lambda function: [function(i) for i in range(int(first), int(last))]

    def fori_loop(first, last, function, carry):
        for i in range(int(first), int(last)):
            carry = function(i, carry)
        return carry

    def warp_map(function):
        axes, failures = _here.axes, []

        def run(warp):
            _here.axes = axes | {"warp": warp}
            try:
                function(warp)
            except BaseException as error:
                failures.append(error)

        run_at_once(run, [(warp,) for warp in range(4)], failures)

    nothing = lambda *_, **__: None  # noqa: E731
    on_gpu = {
        "kernel": kernel,
        "copy_gmem_to_smem": copy,
        "copy_smem_to_gmem": write_back,
        "barrier_wait": Barriers.wait,
        "barrier_arrive": Barriers.arrive,
        "load": lambda ref, **_: jnp.asarray(ref.array.copy()),
        "wgmma": multiply,
        "wgmma_wait": lambda left: _here.sums.wait(left),
        "WGMMAAccumulatorRef": types.SimpleNamespace(init=Sums),
        "layout_cast": lambda x, _: x,
        "commit_smem": nothing,
        "wait_smem_to_gmem": nothing,
        "set_max_registers": nothing,
        "warp_map": warp_map,
    }
    for name, function in on_gpu.items():
        monkeypatch.setattr(plgpu, name, function)
    monkeypatch.setattr(pl, "when", lambda condition: lambda function: function() if condition else None)
    monkeypatch.setattr(pl, "loop", loop)
    monkeypatch.setattr(pl, "ds", Slice)
    monkeypatch.setattr(pl, "run_state", run_state)
    fake = types.SimpleNamespace(
        div=lambda a, b: int(a) // int(b),
        rem=lambda a, b: int(a) % int(b),
        axis_index=lambda name: _here.axes[name],
        axis_size=lambda name: sizes[name],
        fori_loop=fori_loop,
        broadcast_in_dim=lax.broadcast_in_dim,
        bitcast_convert_type=lax.bitcast_convert_type,
    )
    modules = [name for name in sys.modules if name.startswith("twla_jax.ops.ternary_matmul.gpu_many")]
    for module in map(sys.modules.get, modules):
        monkeypatch.setattr(module, "lax", fake)
