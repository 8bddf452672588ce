"""The emulator of a GPU's threads sees what would be a race on one."""

import numpy as np
import pytest

from helpers import emulated_machine
from helpers import emulated_threads as threads


def shared(count=256):
    """A machine, a word of shared memory for every thread, and its address."""
    ref = emulated_machine.start(count).allocate((count,), np.int32)
    return ref, threads.address(ref) + threads.thread() * 4


def test_what_another_warp_wrote_is_read_after_a_barrier():
    ref, own = shared()
    threads.store(own, threads.thread())
    other = threads.address(ref) + (threads.thread() ^ threads.WARP) * 4
    with pytest.raises(AssertionError, match="no barrier between two warps"):
        threads.load(other)
    threads.barrier(256)
    np.testing.assert_array_equal(threads.load(other)[0].value[0], np.arange(256) ^ threads.WARP)


@pytest.mark.parametrize("reads", [True, False])
def test_a_copy_waits_for_other_warpgroups_and_not_for_its_own(reads):
    ref, own = shared()
    if reads:
        threads.load(own)
    else:
        threads.store(own, threads.thread())
    data = emulated_machine.Global(np.zeros(128, np.int32))[emulated_machine.Slice(0, 128)]
    halves = [ref[emulated_machine.Slice(128 * half, 128)] for half in range(2)]
    with threads.when(threads.thread() < 128):
        emulated_machine.copy(data, halves[0], None)
        with pytest.raises(AssertionError, match="a warpgroup is not done with it"):
            emulated_machine.copy(data, halves[1], None)
        threads.barrier(256)
        emulated_machine.copy(data, halves[1], None)


def test_another_block_is_written_to_once_it_has_begun_and_read_after_a_barrier():
    ref = emulated_machine.start(32, 2).allocate((32,), np.float32)
    own = threads.address(ref) + threads.thread() * 4
    there = threads.address_of_block(own, threads.Word(1 - emulated_machine.machine.blocks))
    value = threads.Real(emulated_machine.machine.blocks)
    with pytest.raises(AssertionError, match="may not have begun"):
        threads.store_of_block(there, value)
    threads.cluster_arrive()
    threads.cluster_wait()
    threads.store_of_block(there, value)
    with pytest.raises(AssertionError, match="no barrier between two warps"):
        threads.load(own)
    threads.cluster_barrier()
    np.testing.assert_array_equal(threads.load(own)[0].real().value, [[1] * 32, [0] * 32])


def test_a_number_is_there_for_all_once_it_is_sent_with_its_tag():
    emulated_machine.start(64, 2)
    ref = emulated_machine.Global(np.full((1, 128), 7 << 16 | 5, np.int32)).at[0]
    me, tag = threads.thread() + threads.Word(emulated_machine.machine.blocks) * 64, threads.Word(8 << 16)
    fours = (me % 32) * 16
    with threads.when(me < 127):
        threads.send(ref, me * 4, tag + me)
    with pytest.raises(AssertionError, match="nobody sends it"):
        threads.receive(ref, [fours], tag)
    with threads.when(me.equals(127)):
        threads.send(ref, me * 4, tag + me)
    found = threads.receive(ref, [fours, threads.Word(0)], tag)
    np.testing.assert_array_equal(found[3].value & 0xFFFF, me.value % 32 * 4 + 3)
    np.testing.assert_array_equal(found[7].value & 0xFFFF, 3)
