"""Attends with one token inside a GPU kernel, from rotated queries to the mix of the values (Mosaic GPU).

Two kernels use it: `decode_attention.gpu`, and `qkv_attention.gpu`, which computes the queries itself.
"""

import jax
import jax.numpy as jnp
from jax import lax

from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import gpu_entries, gpu_lanes
from twla_jax.ops.decode_attention.gpu_finish import finish
from twla_jax.ops.decode_attention.gpu_heads import HeadShape
from twla_jax.ops.hopper import threads


def obstacle(qkv: jax.Array, layer: LayerKV) -> str | None:
    """Return why the kernel cannot take such operands, or None."""
    d, dtype = layer.entries.shape[-1], layer.entries.dtype
    if qkv.dtype != jnp.bfloat16:
        return f"queries are {qkv.dtype}, not bfloat16"
    if dtype not in (jnp.bfloat16, jnp.int8):
        return f"the cache is {dtype}, not bfloat16 or int8"
    return f"heads have {d} features, not 64, 128 or 256" if d not in (64, 128, 256) else None


def other_operands(positions: Positions, window: jax.Array, norm_scales) -> list[jax.Array]:
    """Return what a kernel reads besides the cache and the heads: angles, length, window and weights of the norms."""
    # Two arrays of angles would be two XLA kernels. A row a sequence, or one for all.
    angles = [angle.reshape(-1, angle.shape[-1]) for angle in (positions.cos, positions.sin)]
    scales = map(threads.readable, norm_scales or ())
    return [jnp.stack(angles), positions.query.reshape(-1), window.reshape(1), *scales]


def attend(q, new, entries, cache, limit, memory, outputs, first_head, split, *, shape: HeadShape) -> None:
    """Write the mix of the values to the outputs, and the new token's key and value to the cache.

    Args:
      q: rotated queries, from `gpu_heads.rotate_heads`.
      new: the new token's key and value, from the same function.
      entries: the first entries, in flight since `gpu_entries.fetch`.
      cache: keys and values in global memory, and the scales of both if they are int8.
      limit: the token's position, and how many positions attention reaches back.
      memory: as `gpu_finish.finish` takes it.
      outputs: as `gpu_finish.finish` takes them.
      first_head: the block's first head.
      split: which split of the positions this block reads.
      shape: how the heads are split up.
    """
    (length, window), (partials_smem, of_blocks_smem) = limit, memory
    limits = jnp.maximum(length + 1 - window, 0), length
    of_step = shape.chunk * shape.workers
    skipped = jnp.maximum(lax.div(limits[0], of_step) - 1, 0)
    steps = jnp.maximum(lax.div(length + of_step - 1, of_step) - skipped, 1)
    gpu_lanes.write_entry(new, cache, first_head, split, length, shape=shape)

    def index(i):
        """Return the number of the i-th step: the first one is in flight before the window is known, and is step 0."""
        return jnp.where(i == 0, 0, skipped + i)

    def step(i, carry):
        state, entries = carry
        state = gpu_lanes.attend_step(state, q, entries, index(i), split, limits, shape=shape)
        return state, gpu_entries.fetch(cache, index(i + 1), split, limits, shape=shape)

    state = gpu_lanes.initial_state(q, new, split, shape=shape)
    if cache[0].shape[0] <= of_step:  # all of them are in flight
        state = gpu_lanes.attend_step(state, q, entries, jnp.int32(0), split, limits, shape=shape)
    else:
        state, _ = lax.fori_loop(0, steps, step, (state, entries))
    finish(state, partials_smem, of_blocks_smem, outputs, first_head, split, shape=shape)
