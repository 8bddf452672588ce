"""The emulator of a GPU's threads refuses what would be a race on one."""

import numpy as np
import pytest

from helpers import emulated_machine, emulated_threads


def shared(count=256):
    """Return a machine, a word of shared memory for every thread, and its address."""
    ref = emulated_machine.start(count).allocate((count,), np.int32)
    return ref, emulated_threads.address(ref) + emulated_threads.thread() * 4


def test_what_another_warp_wrote_is_read_after_a_barrier():
    ref, own = shared()
    emulated_threads.store(own, emulated_threads.thread())
    other = emulated_threads.address(ref) + (emulated_threads.thread() ^ emulated_threads.WARP) * 4
    with pytest.raises(AssertionError, match="no barrier between two warps"):
        emulated_threads.load(other)
    emulated_threads.barrier(256)
    np.testing.assert_array_equal(
        emulated_threads.load(other)[0].value[0], np.arange(256) ^ emulated_threads.WARP
    )


@pytest.mark.parametrize("reads", [True, False])
def test_a_copy_waits_for_other_warpgroups_and_not_for_its_own(reads):
    ref, own = shared()
    if reads:
        emulated_threads.load(own)
    else:
        emulated_threads.store(own, emulated_threads.thread())
    data = emulated_machine.Global(np.zeros(128, np.int32))[emulated_machine.Slice(0, 128)]
    halves = [ref[emulated_machine.Slice(128 * half, 128)] for half in range(2)]
    with emulated_threads.when(emulated_threads.thread() < 128):
        emulated_machine.copy(data, halves[0], None)
        with pytest.raises(AssertionError, match="another warpgroup still uses this memory"):
            emulated_machine.copy(data, halves[1], None)
        emulated_threads.barrier(256)
        emulated_machine.copy(data, halves[1], None)


def test_another_block_is_written_to_once_it_has_begun_and_read_after_a_barrier():
    ref = emulated_machine.start(32, 2).allocate((32,), np.float32)
    own = emulated_threads.address(ref) + emulated_threads.thread() * 4
    there = emulated_threads.address_of_block(own, emulated_threads.Word(1 - emulated_machine.machine.blocks))
    value = emulated_threads.Real(emulated_machine.machine.blocks)
    with pytest.raises(AssertionError, match="may not have begun"):
        emulated_threads.store_of_block(there, value)
    emulated_threads.cluster_arrive()
    emulated_threads.cluster_wait()
    emulated_threads.store_of_block(there, value)
    with pytest.raises(AssertionError, match="no barrier between two warps"):
        emulated_threads.load(own)
    emulated_threads.cluster_barrier()
    np.testing.assert_array_equal(emulated_threads.load(own)[0].real().value, [[1] * 32, [0] * 32])


def test_a_number_is_there_for_all_once_it_is_sent_with_its_tag():
    emulated_machine.start(64, 2)
    ref = emulated_machine.Global(np.full((1, 128), 7 << 16 | 5, np.int32)).at[0]
    me, tag = (
        emulated_threads.thread() + emulated_threads.Word(emulated_machine.machine.blocks) * 64,
        emulated_threads.Word(8 << 16),
    )
    fours = (me % 32) * 16
    with emulated_threads.when(me < 127):
        emulated_threads.send(ref, me * 4, tag + me)
    with pytest.raises(AssertionError, match="nobody sends it"):
        emulated_threads.receive(ref, [fours], tag)
    with emulated_threads.when(me.equals(127)):
        emulated_threads.send(ref, me * 4, tag + me)
    found = emulated_threads.receive(ref, [fours, emulated_threads.Word(0)], tag)
    np.testing.assert_array_equal(found[3].value & 0xFFFF, me.value % 32 * 4 + 3)
    np.testing.assert_array_equal(found[7].value & 0xFFFF, 3)
