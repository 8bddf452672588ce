"""Computes queries, keys, values and attention in one kernel on Hopper GPUs (Pallas Mosaic GPU), for one token.

Every block computes some rows of queries, keys and values, and then attends with one head to some of the positions.
Between the two it waits, through global memory, for the few blocks that computed its head: see `gpu_exchange`. So all
blocks must be resident at once, one to each multiprocessor. Entries of the cache are loaded behind the weights, while
products and waits go on.
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
from twla_jax.ops.decode_attention import AttentionSplits, gpu_attend, gpu_entries, gpu_heads, split_sizes
from twla_jax.ops.decode_attention.gpu_heads import HeadShape
from twla_jax.ops.hopper import tags, threads
from twla_jax.ops.hopper.limits import STREAMING_MULTIPROCESSORS
from twla_jax.ops.qkv_attention import gpu_exchange
from twla_jax.ops.quantized_linear import gpu_linear
from twla_jax.ops.rotate_quantize import gpu_rotation
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul import gpu_ring
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig
from twla_jax.ops.ternary_matmul.weight import KernelWeight

_PIECES = 2  # in which a warpgroup's first entries come


def obstacle(
    x: jax.Array, rotation: KernelRotation | None, weight: KernelWeight, layer: LayerKV, *, wide: bool = False
) -> str | None:
    """Return why the kernel cannot take such operands, or None."""
    if x.shape[0] != 1:
        return f"there are {x.shape[0]} tokens, not one"
    if reason := gpu_linear.obstacle(x, rotation, weight, wide=wide):
        return reason
    if reason := gpu_attend.obstacle(x, layer):
        return reason
    assert rotation is not None  # `gpu_linear.obstacle` has refused None
    try:
        _launch_plan(x, rotation, weight, layer, wide=wide)
    except ValueError as error:
        return str(error)
    return None


def _launch_plan(
    x: jax.Array, rotation: KernelRotation, weight: KernelWeight, layer: LayerKV, *, wide: bool = False
) -> tuple[Rows, RingTileConfig, HeadShape]:
    """Return how both halves are split up.

    Raises:
      ValueError: the blocks of the two halves do not match, or are not all resident at once.
    """
    _, _, kv_heads, size, d = layer.entries.shape
    heads, quantized = weight.out_features // d - 2 * kv_heads, layer.scales is not None
    config = split_sizes.split_config(heads, heads // kv_heads, size, d, quantized=quantized, apart=True)
    if not config.apart:
        raise ValueError("attention is faster without splits")
    config = split_sizes.all_at_once(config, size, d, quantized=quantized)
    shape = HeadShape(d=d, heads=heads, kv_heads=kv_heads, quantized=quantized, config=config)
    beside = layer.entries.dtype.itemsize * math.prod(_staged_shape(shape)) + 8 * config.warps * (d + 2)
    rows, of_linear = gpu_linear.launch_plan(x, rotation, weight, wide=wide, beside=beside)
    blocks = pl.cdiv(weight.out_features, rows.each)
    if 4 * of_linear.warpgroups != config.warps:
        raise ValueError(
            f"blocks would need {of_linear.warpgroups} warpgroups for products, {config.warps} warps for attention"
        )
    if not heads * config.splits <= blocks <= min(STREAMING_MULTIPROCESSORS, multiprocessors()):
        raise ValueError(
            f"{blocks} blocks for rows and {heads * config.splits} for positions do not fit together"
        )
    return rows, of_linear, shape


def _staged_shape(shape: HeadShape) -> tuple[int, ...]:
    """Return the shape of the first entries of each warpgroup's warps, in shared memory."""
    return shape.config.warps // 4, 2, 4 * shape.chunk, shape.d


def _scratch_types(
    rows: Rows,
    config: RingTileConfig,
    of_token: gpu_rotation.TokenShape,
    weight: KernelWeight,
    shape: HeadShape,
    dtype,
) -> dict[str, Any]:
    """Return the shared memory of `_kernel`, with entries of this dtype."""
    return {
        "of_linear": gpu_linear.scratch_types(rows, config, of_token, weight),
        "staged_smem": plgpu.SMEM(_staged_shape(shape), dtype),
        "arrived": plgpu.Barrier(num_arrivals=2 * _PIECES, num_barriers=config.warpgroups),
        "vectors_smem": plgpu.SMEM((gpu_exchange.VECTORS, shape.d), jnp.bfloat16),
        "partials_smem": plgpu.SMEM((shape.config.warps, 1, shape.d + 2), jnp.float32),
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
) -> tuple[AttentionSplits, LayerKV, Int32[Array, "1 all_heads_d"]]:
    """Return what `reference.qkv_attention` computes, in splits, and the exchange with the next tag."""
    wide = settings is None
    rows, config, shape = _launch_plan(x, rotation, weight, layer, wide=wide)
    of_token = gpu_rotation.token_shape(x, rotation, config.warpgroups, wide=wide)
    scratch = _scratch_types(rows, config, of_token, weight, shape, layer.entries.dtype)
    heads, splits, d = shape.heads, shape.config.splits, shape.d
    norm = () if norm_scale is None else (threads.readable(norm_scale),)
    body = functools.partial(
        _kernel,
        rows=rows,
        config=config,
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
            num_threads=config.warpgroups,
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
        jnp.stack([positions.cos.reshape(-1), positions.sin.reshape(-1)]),
        positions.query.reshape(1),
        window.reshape(1),
        *map(threads.readable, head_norm_scales or ()),
        *gpu_linear.global_operands((x,), rotation, settings, weight, norm),
    )
    mix = AttentionSplits(mixed=mixed.reshape(1, splits, heads * d), softmax=softmax)
    cache, words = jax.tree.map(jax.freeze, (cache, words))
    return mix, layer.with_stores(cache), words


def _kernel(
    exchange_gmem,
    *refs,
    of_linear,
    staged_smem,
    arrived,
    vectors_smem,
    partials_smem,
    rows: Rows,
    config: RingTileConfig,
    of_token: gpu_rotation.TokenShape,
    weight: KernelWeight,
    shape: HeadShape,
    epsilon: float | None,
    head_epsilon: float,
):
    *refs, mixed_gmem, softmax_gmem = refs
    of_cache, refs = refs[: 1 + shape.quantized], refs[1 + shape.quantized :]
    count = 8 + 1 + (epsilon is not None)
    (angles_gmem, length_gmem, window_gmem, *norm_scales), operands = refs[:-count], refs[-count:]
    block, group = lax.axis_index("rows"), lax.axis_index("warpgroup")
    split = lax.rem(block, jnp.int32(shape.config.splits))
    head = lax.div(block, jnp.int32(shape.config.splits))
    kv_head = lax.div(head, jnp.int32(shape.heads // shape.kv_heads))
    attends = head < shape.heads
    tag = tags.next_tag(exchange_gmem.at[0], block * rows.each)
    cache = [ref.at[kind, 0, kv_head] for ref in of_cache for kind in range(2)]
    staged = [staged_smem.at[group, kind] for kind in range(2)]
    limit = length_gmem[0], window_gmem[0]

    def stage():
        positions = 4 * shape.chunk // _PIECES
        for piece in range(_PIECES):
            first = ((split * config.warpgroups + group) * _PIECES + piece) * positions
            # Past the end, nothing is read.
            first = jnp.where(first < limit[0], first, cache[0].shape[0])
            for ref, to in zip(cache, staged, strict=False):
                target = to.at[pl.ds(piece * positions, positions)]
                plgpu.copy_gmem_to_smem(ref.at[pl.ds(first, positions)], target, arrived.at[group])

    start_prefetch, finish_outputs = gpu_linear.linear_stages(
        *operands,
        outputs=gpu_ring.RingOutputs(sent=exchange_gmem, tag=tag),
        rows=rows,
        config=config,
        shape=of_token,
        weight=weight,
        epsilon=epsilon,
        **of_linear,
    )
    start_prefetch()
    finish_outputs(alongside=lambda: pl.when(attends)(stage))

    @pl.when(attends)
    def attend():
        angles = gpu_heads.fetch_angles(angles_gmem.at[0], angles_gmem.at[1], norm_scales, shape=shape)
        scales = [gpu_entries.first_scales(cache[2:], split, shape=shape)] if shape.quantized else []
        outputs = [ref.at[0, split] for ref in (mixed_gmem, softmax_gmem)]
        scratch = partials_smem, partials_smem  # only a cluster needs a second one
        query, *new = (vectors_smem.at[i] for i in range(gpu_exchange.VECTORS))
        # Wait for entries first: the other blocks' numbers mostly arrive last.
        plgpu.barrier_wait(arrived.at[group])
        entries = gpu_entries.from_shared(staged, scales, split, shape=shape)
        gpu_exchange.receive(exchange_gmem.at[0], tag, head, kv_head, vectors_smem, shape=shape)
        q, new = gpu_heads.rotate_heads([query], new, angles, shape=shape, epsilon=head_epsilon, shared=True)
        gpu_attend.attend(q, new, entries, cache, limit, scratch, outputs, head, split, shape=shape)
