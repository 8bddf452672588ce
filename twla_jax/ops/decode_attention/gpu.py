"""Attention of one new token in one kernel on Hopper GPUs (Pallas Mosaic GPU), bound by the cache's way from memory.

Thread by thread: so few queries meet a key that tensor cores, and what has to be waited for around them, bring nothing.
A warp reads some positions of a key head at once, 16 bytes of a key or value a thread, on their way before the queries
are there. The warps of a block, and the blocks of a cluster, share the positions; each has a softmax of its own, which
meet in shared memory. Where whoever reads the mix takes `AttentionParts`, blocks share positions without a cluster, as
sums that meet through one cost 2 µs. The new token's own key and value never pass through the cache: the first warp
begins with them.
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
from twla_jax.ops.attention.parts import AttentionParts
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import gpu_entries
from twla_jax.ops.decode_attention import gpu_lanes as lanes
from twla_jax.ops.decode_attention import split_sizes as tuning
from twla_jax.ops.decode_attention.gpu_finish import finish
from twla_jax.ops.decode_attention.gpu_lanes import Shape
from twla_jax.ops.hopper import threads as threads


def obstacle(qkv: jax.Array, layer: LayerKV) -> str | None:
    """Why the kernel cannot take such operands, or None."""
    d, dtype = layer.entries.shape[-1], layer.entries.dtype
    if qkv.dtype != jnp.bfloat16:
        return f"queries are {qkv.dtype}, not bfloat16"
    if dtype not in (jnp.bfloat16, jnp.int8):
        return f"the cache is {dtype}, not bfloat16 or int8"
    return f"heads have {d} features, not 64, 128 or 256" if d not in (64, 128, 256) else None


def decode_attention(
    qkv: BFloat16[Array, "b all_heads d"],
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    *,
    epsilon: float = 0.0,
    apart: bool = False,
    tiles: tuning.Tiles | None = None,
) -> tuple[BFloat16[Array, "b heads_d"] | AttentionParts, LayerKV]:
    """What `reference.decode_attention` computes, in bf16; `apart`, in parts if that is faster."""
    b, all_heads, d = qkv.shape
    _, _, kv_heads, size, _ = layer.entries.shape
    heads, quantized = all_heads - 2 * kv_heads, layer.scales is not None
    if tiles is None:
        # Parts of several sequences take their reader as long as they save here.
        apart = apart and b == 1
        tiles = tuning.tiles(b * heads, heads // kv_heads, size, d, quantized=quantized, apart=apart)
    shape = Shape(d=d, heads=heads, kv_heads=kv_heads, quantized=quantized, tiles=tiles)
    splits, blocks = tiles.splits, b * heads // tiles.queries
    if tiles.apart:
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
            parts_smem=plgpu.SMEM((tiles.warps, tiles.queries, d + 2), jnp.float32),
            of_blocks_smem=plgpu.SMEM((splits, 3, tiles.queries * d // splits), jnp.float32),  # of a cluster
        ),
        out_type=(mixed, softmax) if tiles.apart else (mixed,),
        mesh=plgpu.Mesh(num_threads=tiles.warps // 4, thread_name="warpgroup", **grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="decode_attention",
    )
    cache = jax.tree.map(jax.new_ref, layer.stores)
    mixed, *softmax = kernel(
        *jax.tree.leaves(cache),
        qkv,
        jnp.stack([positions.cos[0], positions.sin[0]]),  # of both, XLA makes two kernels
        positions.query[:1],
        window.reshape(1),
        *map(threads.readable, norm_scales or ()),
    )
    mixed = mixed.reshape(*outputs[:-1], heads * d)
    if softmax:
        mixed = AttentionParts(mixed=mixed, softmax=softmax[0])
    return mixed, layer.with_stores(jax.tree.map(jax.freeze, cache))


def _kernel(*refs, parts_smem, of_blocks_smem, shape: Shape, epsilon: float):
    count = 2 if shape.quantized else 1
    of_cache, (qkv_gmem, turns_gmem, length_gmem, window_gmem) = refs[:count], refs[count : count + 4]
    *norm_scales, out_gmem = refs[count + 4 : len(refs) - shape.tiles.apart]
    tiles, heads, kv_heads = shape.tiles, shape.heads, shape.kv_heads
    of_sequence = heads // tiles.queries
    sequence, first_head = (op(lax.axis_index("head"), jnp.int32(of_sequence)) for op in (lax.div, lax.rem))
    first_head *= tiles.queries
    kv_head = lax.div(first_head, jnp.int32(heads // kv_heads))
    split = lax.axis_index("split") if tiles.splits > 1 else jnp.int32(0)
    cache = [ref.at[kind, sequence, kv_head] for ref in of_cache for kind in range(2)]
    # The first ones before it is known how many there are: what is too much is left out later.
    entries = gpu_entries.fetch(cache, jnp.int32(0), split, shape=shape)
    if tiles.splits > 1 and not tiles.apart:
        _arrive()
    limit = length_gmem[0], window_gmem[0]
    angles = lanes.fetch_angles(turns_gmem.at[0], turns_gmem.at[1], norm_scales, shape=shape)
    q, new = lanes.turn(
        [qkv_gmem.at[sequence, first_head + i] for i in range(tiles.queries)],
        [qkv_gmem.at[sequence, row + kv_head] for row in (heads, heads + kv_heads)],
        angles,
        shape=shape,
        epsilon=epsilon,
    )
    place = (sequence, split) if tiles.apart else (sequence,)
    outputs = [out_gmem.at[place], *(ref.at[place] for ref in refs[len(refs) - tiles.apart :])]
    memory = parts_smem, of_blocks_smem
    attend(q, new, entries, cache, limit, memory, outputs, first_head, split, shape=shape)


def attend(q, new, entries, cache, limit, memory, outputs, first_head, split, *, shape: Shape) -> None:
    """From turned queries, the new token's key and value, and the first entries, to the outputs and the cache.

    Args:
      q: and `new`, from `gpu_lanes.turn`.
      limit: the token's position, and how many positions attention reaches back.
      memory: and `outputs`, as `gpu_finish.finish` takes them.
    """
    (length, window), (parts_smem, of_blocks_smem) = limit, memory
    limits = jnp.maximum(length + 1 - window, 0), length
    of_step = shape.chunk * shape.workers
    skipped = jnp.maximum(lax.div(limits[0], of_step) - 1, 0)
    steps = jnp.maximum(lax.div(length + of_step - 1, of_step) - skipped, 1)
    lanes.write(new, cache, first_head, split, length, shape=shape)

    def index(i):
        """Of the i-th step that there is: before the first one in the window only the one that is under way."""
        return jnp.where(i == 0, 0, skipped + i)

    def step(i, carry):
        state, entries = carry
        state = lanes.attend(state, q, entries, index(i), split, limits, shape=shape)
        return state, gpu_entries.fetch(cache, index(i + 1), split, limits, shape=shape)

    state = lanes.begin(q, new, split, shape=shape)
    if cache[0].shape[0] <= of_step:  # all of them are under way
        state = lanes.attend(state, q, entries, jnp.int32(0), split, limits, shape=shape)
    else:
        state, _ = lax.fori_loop(0, steps, step, (state, entries))
    finish(state, parts_smem, of_blocks_smem, outputs, first_head, split, shape=shape)


def _arrive() -> None:
    """Tells the cluster that this block has begun, so that the others may write into its memory."""

    @threads.on_threads()
    def arrive(_):
        threads.cluster_arrive()

    arrive()
