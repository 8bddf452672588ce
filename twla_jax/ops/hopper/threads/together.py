"""Identifies a thread, and synchronises and reduces over threads of a warp, a block or a cluster."""

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu

from twla_jax.ops.hopper.threads.scalars import Real, Word, ptx_words, word

WARP = 32
_BARRIER = 15  # of 16; Mosaic takes 0 for a block, and one for each warpgroup after it


def thread() -> Word:
    """Return this thread's number in its block."""
    return Word(arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x)))


def barrier(count: int, group: Word | int = 0) -> None:
    """Wait for the `count` threads of this group of the block's, one of a few."""
    number = word(_BARRIER) - group
    utils.inline_ptx(f"bar.sync $0, {count};", number.value, has_side_effects=True, convergent=True)


def warp_barrier() -> None:
    """Wait for the lanes of the warp, and for what they read and wrote."""
    utils.inline_ptx("bar.warp.sync 0xffffffff;", has_side_effects=True, convergent=True)


def cluster_arrive() -> None:
    """Signal to the cluster's blocks that this thread has arrived, with all that it wrote to shared memory before."""
    utils.inline_ptx("barrier.cluster.arrive.release.aligned;", has_side_effects=True, convergent=True)


def cluster_wait() -> None:
    """Wait until all threads of the cluster's blocks have arrived."""
    utils.inline_ptx("barrier.cluster.wait.acquire.aligned;", has_side_effects=True, convergent=True)


def cluster_barrier() -> None:
    """Wait for all threads of the cluster's blocks, and for what they wrote to shared memory."""
    cluster_arrive()
    cluster_wait()


def publish() -> None:
    """Make this thread's writes to shared memory visible to the tensor cores and the copy engine."""
    utils.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)


def when(condition: ir.Value):
    """Return a context for what is done where the condition holds."""
    return utils.when(condition)


def shuffle[T: (Real, Word)](value: T, distance: int) -> T:
    """Return the value of the lane whose number differs in the bit `distance`."""
    return type(value)(utils.shfl_bfly(value.value, distance))


def of_lane(value: Real, lane: int) -> Real:
    """Return the value of one lane, in all lanes of its warp."""
    ptx = f"shfl.sync.idx.b32 $0, $1, {lane}, 31, 0xffffffff;"
    return ptx_words(ptx, 1, value, convergent=True)[0].real()


def transposed(value: Word) -> Word:
    """Return a warp's 8 by 8 matrix of 16 bits transposed; lane 4r + c has numbers 2c and 2c + 1 of row r."""
    ptx = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return ptx_words(ptx, 1, value, effects=False, convergent=True)[0]


def warp_least(value: Real) -> Real:
    """Return the least value of a warp."""
    return _ordered(_reduce(_ordered(value.word()), "min")).real()


def warp_most(value: Real) -> Real:
    """Return the largest value of a warp."""
    return _ordered(_reduce(_ordered(value.word()), "max")).real()


def warp_sum(value: Word) -> Word:
    """Return the sum over a warp."""
    return _reduce(value, "add")


def _ordered(bits: Word) -> Word:
    """Return floats' bits as integers in the same order; applied twice, the bits again."""
    sign = Word(arith.shrsi(bits.value, word(31).value))
    return bits ^ (sign & 0x7FFFFFFF)


def _reduce(value: Word, kind: str) -> Word:
    return ptx_words(f"redux.sync.{kind}.s32 $0, $1, 0xffffffff;", 1, value, convergent=True)[0]
