"""Attends with one new token on Hopper GPUs (Pallas Mosaic GPU), limited by reading the cache from memory.

It works thread by thread: so few queries share a key that tensor cores, with the synchronisation around them, do not
pay. A warp reads some positions of a key head at once, 16 bytes of a key or value a thread, in flight before the
queries are there. The warps of a block, and the blocks of a cluster, share the positions; each has a softmax of its
own, and these are combined in shared memory. Where the reader of the mix takes `AttentionSplits`, blocks share
positions without a cluster, since combining through one costs 2 µs. The new token's own key and value never pass
through the cache: the first warp starts from them.
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
    gpu_attend,
    gpu_entries,
    gpu_grouped,
    gpu_heads,
    gpu_merge,
    split_sizes,
)
from twla_jax.ops.decode_attention.gpu_heads import HeadShape
from twla_jax.ops.hopper import threads


def decode_attention(
    qkv: BFloat16[Array, "b all_heads d"],
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    *,
    epsilon: float = 0.0,
    apart: bool = False,
    config: split_sizes.SplitConfig | split_sizes.GroupConfig | None = None,
) -> tuple[BFloat16[Array, "b heads_d"] | AttentionSplits, LayerKV]:
    """Return what `reference.decode_attention` computes, in bf16; with `apart`, in splits if that is faster."""
    b, all_heads, d = qkv.shape
    _, _, kv_heads, size, _ = layer.entries.shape
    heads, quantized = all_heads - 2 * kv_heads, layer.scales is not None
    if config is None:
        config = split_sizes.group_config(b * heads, heads // kv_heads, size, d, quantized=quantized)
    if isinstance(config, split_sizes.GroupConfig):
        operands = (qkv, layer, positions, window, norm_scales)
        mixed, layer = gpu_grouped.decode_attention(*operands, epsilon=epsilon, config=config)
        return gpu_merge.merge(mixed) if isinstance(mixed, AttentionSplits) else mixed, layer
    if config is None:
        # With several sequences, merging the splits takes the reader as long as they save here.
        apart = apart and b == 1
        config = split_sizes.split_config(
            b * heads, heads // kv_heads, size, d, quantized=quantized, apart=apart
        )
    shape = HeadShape(d=d, heads=heads, kv_heads=kv_heads, quantized=quantized, config=config)
    splits, blocks = config.splits, b * heads // config.queries
    if config.apart:
        grid, outputs = {"grid": (blocks, splits), "grid_names": ("head", "split")}, (b, splits, heads)
    else:
        grid, outputs = {"grid": (blocks,), "grid_names": ("head",)}, (b, heads)
        if splits > 1:
            grid |= {"cluster": (splits,), "cluster_names": ("split",)}
    mixed, softmax = (
        jax.ShapeDtypeStruct((*outputs, n), kind) for n, kind in ((d, qkv.dtype), (2, jnp.float32))
    )
    body = functools.partial(_kernel, shape=shape, epsilon=epsilon)
    kernel: Any = pl.kernel(
        lambda *refs: pl.run_scoped(
            functools.partial(body, *refs),
            collective_axes="warpgroup",
            partials_smem=plgpu.SMEM((config.warps, config.queries, d + 2), jnp.float32),
            of_blocks_smem=plgpu.SMEM((splits, 3, config.queries * d // splits), jnp.float32),  # of a cluster
        ),
        out_type=(mixed, softmax) if config.apart else (mixed,),
        mesh=plgpu.Mesh(num_threads=config.warps // 4, thread_name="warpgroup", **grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="decode_attention",
    )
    cache = jax.tree.map(jax.new_ref, layer.stores)
    mixed, *softmax = kernel(
        *jax.tree.leaves(cache),
        qkv,
        *gpu_attend.other_operands(positions, window, norm_scales),
    )
    mixed = mixed.reshape(*outputs[:-1], heads * d)
    if softmax:
        mixed = AttentionSplits(mixed=mixed, softmax=softmax[0])
    return mixed, layer.with_stores(jax.tree.map(jax.freeze, cache))


def _kernel(*refs, partials_smem, of_blocks_smem, shape: HeadShape, epsilon: float):
    count = 2 if shape.quantized else 1
    of_cache, (qkv_gmem, angles_gmem, length_gmem, window_gmem) = refs[:count], refs[count : count + 4]
    *norm_scales, out_gmem = refs[count + 4 : len(refs) - shape.config.apart]
    config, heads, kv_heads = shape.config, shape.heads, shape.kv_heads
    of_sequence = heads // config.queries
    sequence, first_head = (op(lax.axis_index("head"), jnp.int32(of_sequence)) for op in (lax.div, lax.rem))
    first_head *= config.queries
    kv_head = lax.div(first_head, jnp.int32(heads // kv_heads))
    split = lax.axis_index("split") if config.splits > 1 else jnp.int32(0)
    cache = [ref.at[kind, sequence, kv_head] for ref in of_cache for kind in range(2)]
    # The first loads start before the length is known; entries past it are masked later.
    entries = gpu_entries.fetch(cache, jnp.int32(0), split, shape=shape)
    if config.splits > 1 and not config.apart:
        _arrive()
    row = sequence if length_gmem.shape[0] > 1 else 0
    limit = length_gmem[row], window_gmem[0]
    angles = gpu_heads.fetch_angles(angles_gmem.at[0, row], angles_gmem.at[1, row], norm_scales, shape=shape)
    q, new = gpu_heads.rotate_heads(
        [qkv_gmem.at[sequence, first_head + i] for i in range(config.queries)],
        [qkv_gmem.at[sequence, row + kv_head] for row in (heads, heads + kv_heads)],
        angles,
        shape=shape,
        epsilon=epsilon,
    )
    place = (sequence, split) if config.apart else (sequence,)
    outputs = [out_gmem.at[place], *(ref.at[place] for ref in refs[len(refs) - config.apart :])]
    memory = partials_smem, of_blocks_smem
    gpu_attend.attend(q, new, entries, cache, limit, memory, outputs, first_head, split, shape=shape)


def _arrive() -> None:
    """Signal to the cluster that this block has started, so that the others may write into its memory."""

    @threads.on_threads()
    def arrive(_):
        threads.cluster_arrive()

    arrive()
