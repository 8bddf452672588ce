"""Attends to a block of positions inside a TPU kernel, with a running softmax.

Of an int8 cache nothing that is read is widened: queries and weights are whole numbers of 16 bits, in two int8 parts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Num

from twla_jax.ops.decode_attention import tpu_entries
from twla_jax.ops.decode_attention.tpu_groups import LANES, GroupShape
from twla_jax.ops.ternary_matmul import tpu_unpack

_UNSEEN = -1e30  # a score
_LARGEST = 32512  # code whose upper part, `(code + 128) >> 8`, is int8


def memory(shape: GroupShape, d: int, dtype) -> list[Any]:
    """Return what is kept from block to block: queries and what scores are multiplied by, and the softmax's state."""
    parts, row = 2 if dtype == jnp.int8 else 1, (shape.groups, shape.rows)
    return [
        pltpu.VMEM((shape.groups, parts * shape.rows, shape.together * d), tpu_unpack.operand(dtype)),
        *[pltpu.VMEM((*row, width), jnp.float32) for width in (LANES, LANES, LANES, d)],
    ]


def kernel(lengths_ref, window_ref, q_ref, entries_ref, *refs, shape: GroupShape) -> None:
    """Attend with a sequence's queries to a block of positions, if any of these is visible: the kernel's body.

    Args:
      lengths_ref: the positions of the sequences' tokens, or of all.
      window_ref: how many positions attention reaches back.
      q_ref: `[groups, rows, d]`.
      entries_ref: keys and values `[2, kv, block, d]`.
      *refs: scales `[2, kv, block]` of int8 entries; the mix of the values, like q; and `memory`.
      shape: how heads are grouped.
    """
    *scales_ref, out_ref, left_ref, factor_ref, top_ref, total_ref, mixed_ref = refs
    row, block = pl.program_id(0), pl.program_id(1)
    length = lengths_ref[row if lengths_ref.shape[0] > 1 else 0]
    first, last, first_block, last_block = shape.visible(length, window_ref[0])

    @pl.when(block == 0)
    def _():
        for ref, start in ((top_ref, _UNSEEN), (total_ref, 0), (mixed_ref, 0)):
            ref[...] = jnp.full(ref.shape, start, ref.dtype)
        for group in range(shape.groups):
            parts, step = _parts(q_ref[group].astype(jnp.float32), whole=bool(scales_ref))
            left_ref[group] = _left(parts, shape, left_ref.dtype)
            factor = step * (q_ref.shape[-1] ** -0.5 * math.log2(math.e))
            factor_ref[group] = jnp.broadcast_to(factor, factor_ref.shape[1:])

    @pl.when((block >= first_block) & (block <= last_block))
    def _():
        position = block * shape.block + lax.broadcasted_iota(jnp.int32, (1, shape.block), 1)
        seen = (position >= first) & (position <= last)
        for group in range(shape.groups):
            scales = [
                tpu_entries.scales(ref.at[kind], group, shape) for ref in scales_ref for kind in range(2)
            ]
            scores = _product(left_ref[group], tpu_entries.keys(entries_ref, group, shape, left_ref.dtype), 1)
            scores = _joined(scores, shape) * factor_ref[group, :, :1]
            scores = jnp.where(seen, scores * scales[0] if scales else scores, _UNSEEN)
            top = scores.max(1, keepdims=True)
            weights = jnp.exp2(scores - top)
            total = weights.sum(1, keepdims=True)
            if scales:  # past the end, scales may be anything
                weights = jnp.where(seen, weights * scales[1], 0)
            parts, step = _parts(weights, whole=bool(scales))
            values = tpu_entries.values(entries_ref, group, block, shape, left_ref.dtype)
            mixed = _joined(_product(_left(parts, shape, left_ref.dtype), values, 0), shape) * step
            _add((top_ref, total_ref, mixed_ref), group, top, total, mixed)

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = (mixed_ref[...] / total_ref[:, :, :1]).astype(out_ref.dtype)


def _parts(x: Float32[Array, "rows n"], *, whole: bool) -> tuple[list[jax.Array], jax.Array | float]:
    """Return x, and 1; or, as `whole` numbers, an upper and a lower part, and the step of `256·upper + lower`."""
    if not whole:
        return [x], 1.0
    step = jnp.maximum(jnp.abs(x).max(1, keepdims=True), 1e-30) * (1 / _LARGEST)
    codes = jnp.round(x * (1 / step)).astype(jnp.int32)
    upper = (codes + 128) >> 8
    return [upper, codes - (upper << 8)], step


def _left(parts: list[jax.Array], shape: GroupShape, dtype) -> Num[Array, "parts_rows together_n"]:
    """Return the left operand of a group's product."""
    return jnp.concatenate([shape.apart(part) for part in parts]).astype(dtype)


def _joined(sums: Num[Array, "parts_rows n"], shape: GroupShape) -> Float32[Array, "rows n"]:
    """Return the products of both parts as one, or of the only one."""
    sums = sums.astype(jnp.float32)
    return sums if len(sums) == shape.rows else 256 * sums[: shape.rows] + sums[shape.rows :]


def _product(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
    dimensions = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=tpu_unpack.exact(left.dtype))


def _add(state_refs, group: int, top: jax.Array, total: jax.Array, mixed: jax.Array) -> None:
    """Add a block's largest score, sum of weights and mix to those of the blocks before it."""
    top_ref, total_ref, mixed_ref = state_refs
    old = top_ref[group, :, :1]
    new = jnp.maximum(old, top)
    before, own = jnp.exp2(old - new), jnp.exp2(top - new)
    total = before * total_ref[group, :, :1] + own * total
    top_ref[group], total_ref[group] = (jnp.broadcast_to(x, top_ref.shape[1:]) for x in (new, total))
    mixed_ref[group] = before * mixed_ref[group] + own * mixed
