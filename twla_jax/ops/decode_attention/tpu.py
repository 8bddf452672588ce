"""Attends with one new token on TPUs (Pallas Mosaic TPU), limited by reading the cache from memory.

XLA normalises, rotates and writes. The kernel reads each key and value once, some positions of all heads of a sequence
in a step; blocks without a visible position are not loaded.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Int32

from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import reference, tpu_attend
from twla_jax.ops.decode_attention.tpu_groups import LANES, GroupShape, block_size

_BLOCK_BYTES = 512 * 1024  # of keys, and as many of values: nothing hides the loading of the first ones
_MEMORY = 32 * 1024 * 1024


def obstacle(qkv: jax.Array, layer: LayerKV) -> str | None:
    """Return why the kernel cannot take such operands, or None."""
    d, dtype = layer.entries.shape[-1], layer.entries.dtype
    if qkv.dtype != jnp.bfloat16:
        return f"queries are {qkv.dtype}, not bfloat16"
    if dtype not in (jnp.bfloat16, jnp.int8):
        return f"the cache is {dtype}, not bfloat16 or int8"
    return f"heads have {d} features, not a multiple of {LANES}" if d % LANES else None


def decode_attention(
    qkv: BFloat16[Array, "b all_heads d"],
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    *,
    epsilon: float = 0.0,
    interpret: bool = False,
) -> tuple[BFloat16[Array, "b heads_d"], LayerKV]:
    """Return what `reference.decode_attention` computes, in bf16."""
    q, layer = reference.rotated_and_written(qkv, layer, positions, norm_scales, epsilon=epsilon)
    return attend(q[:, 0], layer, positions.start.reshape(-1), window.reshape(1), interpret=interpret), layer


def attend(
    q: BFloat16[Array, "b heads d"],
    layer: LayerKV,
    lengths: Int32[Array, " b_or_1"],
    window: Int32[Array, " 1"],
    *,
    interpret: bool = False,
) -> BFloat16[Array, "b heads_d"]:
    """Return the mix of the values for one token of the cache's first b sequences, at the positions `lengths`."""
    (b, heads, d), (_, _, kv_heads, size, _) = q.shape, layer.entries.shape
    block = block_size(kv_heads, size, d * layer.entries.dtype.itemsize, _BLOCK_BYTES)
    shape = GroupShape(heads=heads, kv_heads=kv_heads, size=size, block=block)
    q = q.reshape(b, shape.groups, -1, d)
    padding = shape.rows - q.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))

    def place(row, step, lengths_ref, window_ref):
        length = lengths_ref[row if len(lengths) > 1 else 0]
        *_, first, last = shape.visible(length, window_ref[0])
        return (0, row, 0, jnp.clip(step, first, last), 0)

    of_sequence = pl.BlockSpec((None, *q.shape[1:]), lambda i, *_: (i, 0, 0, 0))
    of_cache = (2, None, kv_heads, block)
    scales = [] if layer.scales is None else [layer.scales]
    mixed = pl.pallas_call(
        functools.partial(tpu_attend.kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, -(-size // block)),
            in_specs=[
                of_sequence,
                pl.BlockSpec((*of_cache, d), place),
                *[pl.BlockSpec(of_cache, lambda *at: place(*at)[:-1]) for _ in scales],
            ],
            out_specs=of_sequence,
            scratch_shapes=tpu_attend.memory(shape, d, layer.entries.dtype),
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_MEMORY
        ),
        interpret=interpret,
    )(lengths, window, q, layer.entries, *scales)
    return mixed[:, :, : shape.rows - padding].reshape(b, heads * d)
