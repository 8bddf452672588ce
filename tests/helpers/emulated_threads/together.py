"""Identifies threads, and does what they do together."""

import contextlib

import numpy as np

from helpers import emulated_machine
from helpers.emulated_machine import WARP
from helpers.emulated_threads.scalars import Real, Word


def thread():
    return Word(emulated_machine.machine.threads)


def barrier(count, group=0):
    assert count == emulated_machine.machine.shape[1] or (Word(group).value == thread().value // count).all()
    emulated_machine.machine.met += 1


def warp_barrier():
    pass  # lanes go in step


def cluster_arrive():
    pass  # writes before it do not count as seen: others may arrive later


def cluster_wait():
    emulated_machine.machine.begun = True


def cluster_barrier():
    emulated_machine.machine.met += 1


def publish():
    pass


@contextlib.contextmanager
def when(condition):
    emulated_machine.machine.masks.append(emulated_machine.machine.masks[-1] & condition)
    yield
    emulated_machine.machine.masks.pop()


def shuffle(value, distance):
    lanes = value.value.reshape(-1, WARP)[:, np.arange(WARP) ^ distance]
    return type(value)(lanes.reshape(emulated_machine.machine.shape))


def of_lane(value, lane):
    lanes = value.value.reshape(-1, WARP)[:, np.full(WARP, lane)]
    return Real(lanes.reshape(emulated_machine.machine.shape))


def transposed(value):
    matrices = np.ascontiguousarray(value.value).view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
    return Word(np.ascontiguousarray(matrices).view(np.uint32).reshape(emulated_machine.machine.shape))


def warp_sum(value):
    return _over_warp(value, np.sum)


def _over_warp(value, operation):
    warps = operation(value.value.reshape(*emulated_machine.machine.shape[:1], -1, WARP), -1, keepdims=True)
    return type(value)(np.repeat(warps, WARP, -1).reshape(emulated_machine.machine.shape))


def warp_least(value):
    return _over_warp(value, np.min)


def warp_most(value):
    return _over_warp(value, np.max)
