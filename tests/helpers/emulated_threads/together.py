"""Which thread this is, and what threads do together."""

import contextlib

import numpy as np

from helpers import emulated_machine as here
from helpers.emulated_machine import WARP
from helpers.emulated_threads.scalars import Real, Word


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


def shuffle(value, distance):
    lanes = value.value.reshape(-1, WARP)[:, np.arange(WARP) ^ distance]
    return type(value)(lanes.reshape(here.machine.shape))


def of_lane(value, lane):
    lanes = value.value.reshape(-1, WARP)[:, np.full(WARP, lane)]
    return Real(lanes.reshape(here.machine.shape))


def warp_sum(value):
    return _over_warp(value, np.sum)


def _over_warp(value, operation):
    warps = operation(value.value.reshape(*here.machine.shape[:1], -1, WARP), -1, keepdims=True)
    return type(value)(np.repeat(warps, WARP, -1).reshape(here.machine.shape))


def warp_least(value):
    return _over_warp(value, np.min)


def warp_most(value):
    return _over_warp(value, np.max)
