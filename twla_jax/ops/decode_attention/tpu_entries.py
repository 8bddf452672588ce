"""Reads a group's keys, values and scales out of a block of the cache inside a TPU kernel."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Num

from twla_jax.ops.decode_attention.tpu_groups import GroupShape


def keys(entries_ref, group: int, shape: GroupShape, dtype) -> Num[Array, "block together_d"]:
    """Return the keys of a group's heads side by side, as the matrix unit takes them."""
    return jnp.concatenate([entries_ref[0, head].astype(dtype) for head in shape.heads_of(group)], axis=1)


def values(
    entries_ref, group: int, block: jax.Array, shape: GroupShape, dtype
) -> Num[Array, "together_block d"]:
    """Return the values of a group's heads one below the other, as the matrix unit takes them."""
    each = [entries_ref[1, head].astype(dtype) for head in shape.heads_of(group)]
    if jnp.issubdtype(entries_ref.dtype, jnp.floating) and shape.size % shape.block:
        # What lies past the end may be NaN, which no weight of zero hides.
        position = block * shape.block + lax.broadcasted_iota(jnp.int32, (shape.block, 1), 0)
        each = [jnp.where(position < shape.size, value, jnp.zeros_like(value)) for value in each]
    return jnp.concatenate(each)


def scales(scales_ref, group: int, shape: GroupShape) -> Float32[Array, "rows block"]:
    """Return the scales of a group's keys, or values, in the rows of the queries that read them."""
    heads = shape.heads_of(group)
    if len(heads) == shape.rows:
        return scales_ref[heads.start : heads.stop]
    return shape.by_row([scales_ref[head : head + 1] for head in heads])
