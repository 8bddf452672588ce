"""Attends with one new token a sequence on tensor cores, to many positions in all (Pallas Mosaic GPU).

With many sequences, or positions, the products take longer thread by thread (`decode_attention.gpu`) than reading the
cache. Here some warps of a block, a group, share the positions of a key head, one softmax each, and read the next ones
while they multiply; see `gpu_grouped_lanes`. Groups of a block have nothing to do with each other: they share it since
the size of a block limits the registers of a thread. Where there are fewer key heads than multiprocessors, several
blocks share the positions, and `gpu_merge` merges what they leave.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.attention.splits import AttentionSplits
from twla_jax.ops.decode_attention import (
    gpu_grouped_copies,
    gpu_grouped_finish,
    gpu_grouped_heads,
    gpu_grouped_lanes,
)
from twla_jax.ops.decode_attention.gpu_attend import other_operands
from twla_jax.ops.decode_attention.gpu_grouped_shape import CHUNK, SLOTS, GroupShape
from twla_jax.ops.decode_attention.split_sizes import GroupConfig


def decode_attention(
    qkv: BFloat16[Array, "b all_heads d"],
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    *,
    epsilon: float = 0.0,
    config: GroupConfig,
) -> tuple[BFloat16[Array, "b heads_d"] | AttentionSplits, LayerKV]:
    """Return what `reference.decode_attention` computes, in bf16; in splits if there are several."""
    b, all_heads, d = qkv.shape
    kv_heads = layer.entries.shape[2]
    heads = all_heads - 2 * kv_heads
    shape = GroupShape(d=d, heads=heads, kv_heads=kv_heads, quantized=layer.scales is not None, config=config)
    body = functools.partial(_kernel, shape=shape, epsilon=epsilon)
    splits = (config.splits,) if config.splits > 1 else ()
    mixed, softmax = (
        jax.ShapeDtypeStruct((b, *splits, heads, n), kind) for n, kind in ((d, qkv.dtype), (2, jnp.float32))
    )
    kernel: Any = pl.kernel(
        lambda *refs: pl.run_scoped(
            functools.partial(body, *refs),
            collective_axes="warpgroup",
            **{name: plgpu.SMEM(size, kind) for name, (size, kind) in memory(shape).items()},
        ),
        out_type=(mixed, softmax) if splits else (mixed,),
        mesh=plgpu.Mesh(
            num_threads=config.groups * config.warps // 4,
            thread_name="warpgroup",
            grid=(b * heads // config.queries // config.groups, *splits),
            grid_names=("head", "split")[: 1 + len(splits)],
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="decode_attention_grouped",
    )
    cache = jax.tree.map(jax.new_ref, layer.stores)
    mixed, *softmax = kernel(*jax.tree.leaves(cache), qkv, *other_operands(positions, window, norm_scales))
    mixed = mixed.reshape(b, *splits, heads * d)
    if softmax:
        mixed = AttentionSplits(mixed=mixed, softmax=softmax[0])
    return mixed, layer.with_stores(jax.tree.map(jax.freeze, cache))


def memory(shape: GroupShape) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the shape and the dtype of each array in shared memory."""
    config, d = shape.config, shape.d
    return {
        "heads_smem": ((config.groups, config.queries + 2, d + gpu_grouped_heads.MARGIN), jnp.float32),
        "own_smem": ((config.groups, config.queries, d + 2), jnp.float32),
        "ring_smem": ((config.groups * config.warps * SLOTS * shape.slot,), jnp.int32),
    }


def _kernel(*refs, heads_smem, own_smem, ring_smem, shape: GroupShape, epsilon: float):
    count = 2 if shape.quantized else 1
    of_cache, (qkv_gmem, angles_gmem, length_gmem, window_gmem) = refs[:count], refs[count : count + 4]
    config, heads, kv_heads = shape.config, shape.heads, shape.kv_heads
    *norm_scales, out_gmem = refs[count + 4 : len(refs) - (config.splits > 1)]
    split = lax.axis_index("split") if config.splits > 1 else jnp.int32(0)
    of_sequence = jnp.int32(heads // config.queries)
    group = lax.div(lax.axis_index("warpgroup"), jnp.int32(config.warps // 4))
    heads_smem, own_smem = heads_smem.at[group], own_smem.at[group]
    number = lax.axis_index("head") * config.groups + group
    sequence, first_head = (op(number, of_sequence) for op in (lax.div, lax.rem))
    first_head *= config.queries
    kv_head = lax.div(first_head, jnp.int32(heads // kv_heads))
    cache = [ref.at[kind, sequence, kv_head] for ref in of_cache for kind in range(2)]
    row = sequence if length_gmem.shape[0] > 1 else 0
    angles = [angles_gmem.at[i, row] for i in range(2)]
    # Before the copies, as they would wait behind these.
    found = gpu_grouped_heads.fetch_heads(
        qkv_gmem.at[sequence], angles, norm_scales, first_head, kv_head, shape=shape
    )
    copies = functools.partial(gpu_grouped_copies.start_copies, cache, ring_smem, shape=shape)
    # The first copies start before the length is known; entries past it are masked later.
    copies(jnp.int32(0), split, jnp.int32(cache[0].shape[0]))
    gpu_grouped_copies.end_copies()
    length, window = length_gmem[row], window_gmem[0]
    start = jnp.maximum(length + 1 - window, 0)
    of_step = CHUNK * config.warps * config.splits
    skipped = jnp.maximum(lax.div(start, of_step) - 1, 0)
    steps = jnp.maximum(lax.div(length + of_step - 1, of_step) - skipped, 1)

    def index(i):
        """Return the number of the i-th step: the first one is in flight before the window is known, and is step 0.

        It counts the steps of all splits, which take turns.
        """
        return jnp.where(i == 0, 0, skipped + i) * config.splits + split

    def fetch(i):
        """Start the copies of the i-th step, if there is one."""
        slot = lax.rem(i, jnp.int32(SLOTS))
        copies(slot, index(i), jnp.where(i < steps, length, 0))
        gpu_grouped_copies.end_copies()

    for i in range(1, SLOTS):
        fetch(jnp.int32(i))

    def rotate(_, found):
        gpu_grouped_heads.rotate_group(found, heads_smem, shape=shape, epsilon=epsilon)
        return found

    # A loop of one trip: else the compiler would start copies after it has waited for the heads, and rotated them.
    lax.fori_loop(0, jnp.minimum(length + 1, 1), rotate, found)
    gpu_grouped_heads.write_entry(heads_smem, cache, first_head, split, length, shape=shape)
    gpu_grouped_finish.attend_to_itself(heads_smem, own_smem, split, shape=shape)
    q = gpu_grouped_heads.load_queries(heads_smem, shape=shape)

    def step(i, state):
        where = ring_smem, lax.rem(i, jnp.int32(SLOTS)), index(i), start, length
        gpu_grouped_copies.wait_for_copies()
        state, weights = gpu_grouped_lanes.weigh(state, q, *where, shape=shape)
        state = gpu_grouped_lanes.mix(state, weights, *where, shape=shape)
        fetch(i + SLOTS)
        return state

    state = lax.fori_loop(0, steps, step, gpu_grouped_lanes.initial_state(shape=shape))
    place = (sequence, split) if config.splits > 1 else (sequence,)
    outputs = [ref.at[place] for ref in (out_gmem, *refs[len(refs) - (config.splits > 1) :])]
    gpu_grouped_finish.finish(state, ring_smem, own_smem, outputs, first_head, shape=shape)
