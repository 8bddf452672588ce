"""From the residual stream to the mix of values in one kernel on Hopper GPUs (Pallas Mosaic GPU), for one token.

Every block makes some rows of queries, keys and values, and then attends with a head to some of the positions. Between
the two it waits for the few blocks that made its head's, through memory: `gpu_exchange`. So all blocks must be there at
once, one to each multiprocessor. Entries of the cache come behind the weights, while products and waits go on.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from twla_jax.devices import multiprocessors
from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import AttentionParts, gpu_entries
from twla_jax.ops.decode_attention import gpu as attention
from twla_jax.ops.decode_attention import gpu_lanes as lanes
from twla_jax.ops.decode_attention import split_sizes as attention_tuning
from twla_jax.ops.decode_attention.gpu_lanes import Shape
from twla_jax.ops.hopper import tags
from twla_jax.ops.hopper import threads as threads
from twla_jax.ops.qkv_attention import gpu_exchange
from twla_jax.ops.quantized_linear import gpu as linear
from twla_jax.ops.rotate_quantize import gpu_token as turning
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul import gpu_ring as ring
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import Tiles
from twla_jax.ops.ternary_matmul.tile_configs import STREAMING_MULTIPROCESSORS
from twla_jax.ops.ternary_matmul.weight import KernelWeight

_PIECES = 2  # in which a warpgroup's first entries come


def obstacle(
    x: jax.Array, rotation: KernelRotation | None, weight: KernelWeight, layer: LayerKV, *, wide: bool = False
) -> str | None:
    """Why the kernel cannot take such operands, or None."""
    if x.shape[0] != 1:
        return f"there are {x.shape[0]} tokens, not one"
    if reason := linear.obstacle(x, rotation, weight, wide=wide):
        return reason
    if reason := attention.obstacle(x, layer):
        return reason
    assert rotation is not None  # which would be an obstacle
    try:
        _plan(x, rotation, weight, layer, wide=wide)
    except ValueError as error:
        return str(error)
    return None


def _plan(
    x: jax.Array, rotation: KernelRotation, weight: KernelWeight, layer: LayerKV, *, wide: bool
) -> tuple[Rows, Tiles, Shape]:
    """How both parts are split up.

    Raises:
      ValueError: the blocks of the two parts do not match, or are not all there at once.
    """
    _, _, kv_heads, size, d = layer.entries.shape
    heads, quantized = weight.out_features // d - 2 * kv_heads, layer.scales is not None
    tiles = attention_tuning.tiles(heads, heads // kv_heads, size, d, quantized=quantized, apart=True)
    if not tiles.apart:
        raise ValueError("attention is faster whole")
    tiles = attention_tuning.all_at_once(tiles, size, d, quantized=quantized)
    shape = Shape(d=d, heads=heads, kv_heads=kv_heads, quantized=quantized, tiles=tiles)
    beside = layer.entries.dtype.itemsize * math.prod(_staged(shape)) + 8 * tiles.warps * (d + 2)
    rows, of_linear = linear.plan(x, rotation, weight, wide=wide, beside=beside)
    blocks = pl.cdiv(weight.out_features, rows.each)
    if 4 * of_linear.warpgroups != tiles.warps:
        raise ValueError(f"blocks have {of_linear.warpgroups} warpgroups for products, {tiles.warps} warps")
    if not heads * tiles.splits <= blocks <= min(STREAMING_MULTIPROCESSORS, multiprocessors()):
        raise ValueError(f"there are {blocks} blocks for rows, and {heads * tiles.splits} for positions")
    return rows, of_linear, shape


def _staged(shape: Shape) -> tuple[int, ...]:
    """The first entries of each warpgroup's warps, in shared memory."""
    return shape.tiles.warps // 4, 2, 4 * shape.chunk, shape.d


def _memory(
    rows: Rows, tiles: Tiles, of_token: turning.Shape, weight: KernelWeight, shape: Shape, dtype
) -> dict[str, Any]:
    """What `_kernel` has of shared memory, with entries of this type."""
    return {
        "of_linear": linear.memory(rows, tiles, of_token, weight),
        "staged_smem": plgpu.SMEM(_staged(shape), dtype),
        "arrived": plgpu.Barrier(num_arrivals=2 * _PIECES, num_barriers=tiles.warpgroups),
        "vectors_smem": plgpu.SMEM((gpu_exchange.VECTORS, shape.d), jnp.bfloat16),
        "parts_smem": plgpu.SMEM((shape.tiles.warps, 1, shape.d + 2), jnp.float32),
    }


def qkv_attention(
    x: BFloat16[Array, "1 m"],
    rotation: KernelRotation,
    settings: Float32[Array, " 3"] | None,
    weight: KernelWeight,
    norm_scale: Float[Array, " m"] | None,
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    head_norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    *,
    exchange: Int32[Array, "1 all_heads_d"],
    epsilon: float = 0.0,
    head_epsilon: float = 0.0,
) -> tuple[AttentionParts, LayerKV, Int32[Array, "1 all_heads_d"]]:
    """Returns what `reference.qkv_attention` computes, in parts, and the exchange with the next tag."""
    wide = settings is None
    rows, tiles, shape = _plan(x, rotation, weight, layer, wide=wide)
    of_token = turning.shape(x, rotation, tiles.warpgroups, wide=wide)
    scratch = _memory(rows, tiles, of_token, weight, shape, layer.entries.dtype)
    heads, splits, d = shape.heads, shape.tiles.splits, shape.d
    norm = () if norm_scale is None else (threads.readable(norm_scale),)
    body = functools.partial(
        _kernel,
        rows=rows,
        tiles=tiles,
        of_token=of_token,
        weight=weight,
        shape=shape,
        epsilon=epsilon if norm else None,
        head_epsilon=head_epsilon,
    )
    kernel: Any = pl.kernel(
        lambda *refs: pl.run_scoped(functools.partial(body, *refs), collective_axes="warpgroup", **scratch),
        out_type=(
            jax.ShapeDtypeStruct((1, splits, heads, d), x.dtype),
            jax.ShapeDtypeStruct((1, splits, heads, 2), jnp.float32),
        ),
        mesh=plgpu.Mesh(
            num_threads=tiles.warpgroups,
            thread_name="warpgroup",
            grid=(pl.cdiv(weight.out_features, rows.each),),
            grid_names=("rows",),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="qkv_attention",
    )
    cache, words = jax.tree.map(jax.new_ref, (layer.stores, exchange))
    of_cache = [cache.entries] if cache.scales is None else [cache.entries, cache.scales]
    mixed, softmax = kernel(
        words,
        *of_cache,
        jnp.stack([positions.cos[0], positions.sin[0]]),
        positions.query[:1],
        window.reshape(1),
        *map(threads.readable, head_norm_scales or ()),
        *linear.operands((x,), rotation, settings, weight, norm),
    )
    parts = AttentionParts(mixed=mixed.reshape(1, splits, heads * d), softmax=softmax)
    cache, words = jax.tree.map(jax.freeze, (cache, words))
    return parts, layer.with_stores(cache), words


def _kernel(
    exchange_gmem,
    *refs,
    of_linear,
    staged_smem,
    arrived,
    vectors_smem,
    parts_smem,
    rows: Rows,
    tiles: Tiles,
    of_token: turning.Shape,
    weight: KernelWeight,
    shape: Shape,
    epsilon: float | None,
    head_epsilon: float,
):
    *refs, mixed_gmem, softmax_gmem = refs
    of_cache, refs = refs[: 1 + shape.quantized], refs[1 + shape.quantized :]
    count = 8 + 1 + (epsilon is not None)
    (turns_gmem, length_gmem, window_gmem, *norm_scales), operands = refs[:-count], refs[-count:]
    block, group = lax.axis_index("rows"), lax.axis_index("warpgroup")
    split = lax.rem(block, jnp.int32(shape.tiles.splits))
    head = lax.div(block, jnp.int32(shape.tiles.splits))
    kv_head = lax.div(head, jnp.int32(shape.heads // shape.kv_heads))
    attends = head < shape.heads
    tag = tags.next_tag(exchange_gmem.at[0], block * rows.each)
    cache = [ref.at[kind, 0, kv_head] for ref in of_cache for kind in range(2)]
    staged = [staged_smem.at[group, kind] for kind in range(2)]
    limit = length_gmem[0], window_gmem[0]

    def stage():
        positions = 4 * shape.chunk // _PIECES
        for piece in range(_PIECES):
            first = ((split * tiles.warpgroups + group) * _PIECES + piece) * positions
            # Past the end, memory is not asked.
            first = jnp.where(first < limit[0], first, cache[0].shape[0])
            for ref, to in zip(cache, staged, strict=False):
                target = to.at[pl.ds(piece * positions, positions)]
                plgpu.copy_gmem_to_smem(ref.at[pl.ds(first, positions)], target, arrived.at[group])

    start, end = linear.begin(
        *operands,
        outputs=ring.Outputs(sent=exchange_gmem, tag=tag),
        rows=rows,
        tiles=tiles,
        shape=of_token,
        weight=weight,
        epsilon=epsilon,
        **of_linear,
    )
    start()
    end(alongside=lambda: pl.when(attends)(stage))

    @pl.when(attends)
    def attend():
        angles = lanes.fetch_angles(turns_gmem.at[0], turns_gmem.at[1], norm_scales, shape=shape)
        scales = [gpu_entries.first_scales(cache[2:], split, shape=shape)] if shape.quantized else []
        outputs = [ref.at[0, split] for ref in (mixed_gmem, softmax_gmem)]
        memory = parts_smem, parts_smem  # there is no cluster, which would need a second one
        query, *new = (vectors_smem.at[i] for i in range(gpu_exchange.VECTORS))
        # Entries first: the others' numbers mostly come last, and then only they are waited for.
        plgpu.barrier_wait(arrived.at[group])
        entries = gpu_entries.from_shared(staged, scales, split, shape=shape)
        gpu_exchange.receive(exchange_gmem.at[0], tag, head, kv_head, vectors_smem, shape=shape)
        q, new = lanes.turn([query], new, angles, shape=shape, epsilon=head_epsilon, shared=True)
        attention.attend(q, new, entries, cache, limit, memory, outputs, head, split, shape=shape)
