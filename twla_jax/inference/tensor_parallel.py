"""Runs kernels on a mesh: each device multiplies its own rows of a weight by an input that every device has whole.

The partitioner cannot look into a kernel, so kernels run under `jax.shard_map`, over the mesh that
`twla_jax.shardings` is for: weights over its axis `model`, batches over `data`. Every linear is split by its outputs,
o and down too: the rotation before them mixes all columns of their input, which must come together for that anyway. No
sum crosses devices, so the outcome does not depend on how many there are.

A decode step then gathers four small arrays a layer: the heads' mix, what o writes, the hidden values, what down
writes. Beside these it sums one row of the embedding, of which all devices but one have zeros, and compares the
devices' likeliest tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from twla_jax.core.tensors import IntegerTensor, TernaryTensor, take_rows
from twla_jax.ops.attention.kv_cache import KVCache, LayerKV
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.integer_matmul import IntegerWeight, integer_rows, integer_weight
from twla_jax.ops.ternary_matmul import KernelWeight, kernel_weight

P = PartitionSpec


def sharded_weight(
    weights: Sequence[TernaryTensor], biases: Sequence[Array | None], mesh: Mesh
) -> KernelWeight:
    """Return `kernel_weight` of each device's share of every matrix's rows, stacked along a leading axis over `model`.

    Where some rows do not divide, the leading axis is 1 and every device has all of them.
    """
    shares = mesh.shape["model"]
    if any(weight.shape[0] % shares for weight in weights):
        shares = 1

    return _stacked(lambda share: _kernel_weight(*share), (weights, biases), shares, mesh)


def sharded_table(tensor: IntegerTensor, mesh: Mesh) -> IntegerWeight:
    """Return `integer_weight` of each device's share of the rows, as `sharded_weight` does of ternary ones."""
    shares = mesh.shape["model"] if tensor.shape[0] % mesh.shape["model"] == 0 else 1
    return _stacked(_integer_weight, tensor, shares, mesh)


_kernel_weight, _integer_weight = jax.jit(kernel_weight), jax.jit(integer_weight)


def _stacked(pack: Callable[[Any], Any], rows: Any, shares: int, mesh: Mesh) -> Any:
    """Return what `pack` makes of each share of the rows, stacked, each share on its device."""

    def share(leaf, index):
        count = leaf.shape[0] // shares
        return jnp.asarray(leaf)[index * count : (index + 1) * count]

    packed = [pack(jax.tree.map(lambda leaf, i=index: share(leaf, i), rows)) for index in range(shares)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)
    return jax.device_put(stack, NamedSharding(mesh, P(_over_model(shares))))


def matmul(
    op: Callable[..., jax.Array],
    x: Any,
    weight: Any,
    mesh: Mesh,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Run `op` on every device's rows.

    Args:
      op: the product that each device runs on its rows: of x, its share of the weight, and of the residual if any.
      x: a pytree of arrays `[b, ...]`.
      weight: from `sharded_weight` or `sharded_table`, or several of these that are split alike.
      mesh: with an axis `model`.
      residual: `[b, t, shares · rows]` that `op` adds to its outputs.

    Returns:
      `[b, t, shares · rows]`: the outputs of each device's share, one share after the other.
    """
    batch, split = _over_data(_batch(x), mesh), _over_model(_shares(weight))
    outputs = P(batch, None, split)
    return jax.shard_map(
        lambda x, weight, *residual: op(x, _own(weight), *residual),
        mesh=mesh,
        in_specs=(P(batch), P(split), *([] if residual is None else [outputs])),
        out_specs=outputs,
        check_vma=False,
    )(x, weight, *([] if residual is None else [residual]))


def rows(table: jax.Array | IntegerWeight, tokens: jax.Array, dtype: Any, mesh: Mesh) -> jax.Array:
    """Return some rows of an embedding that is split by rows, `[b, t, d]`, whole on every device.

    Each device looks up those that it has; the partitioner would bring the whole embedding together for a single token.

    Args:
      table: `[vocab, d]` over `model`, or from `sharded_table`.
      tokens: ids `[b, t]` within the vocabulary.
      dtype: of the result.
      mesh: with an axis `model`.
    """
    devices = mesh.shape["model"]

    def take(table: jax.Array | IntegerWeight, places: jax.Array) -> jax.Array:
        if isinstance(table, IntegerWeight):
            return integer_rows(_own(table), places, dtype)
        return take_rows(table, places, dtype)

    def look_up(table: jax.Array | IntegerWeight, tokens: jax.Array) -> jax.Array:
        count = table.out_features if isinstance(table, IntegerWeight) else table.shape[0]
        places = tokens - count * jax.lax.axis_index("model")
        here = (places >= 0) & (places < count)
        found = take(table, jnp.clip(places, 0, count - 1))
        return jax.lax.psum(jnp.where(here[..., None], found, 0), "model")  # of one row and zeros: exact

    split = _shares(table) > 1 if isinstance(table, IntegerWeight) else table.shape[0] % devices == 0
    if devices == 1 or not split:
        return take(table, tokens)
    batch = P(_over_data(len(tokens), mesh))
    in_specs = P("model"), batch
    return jax.shard_map(look_up, mesh=mesh, in_specs=in_specs, out_specs=batch, check_vma=False)(
        table, tokens
    )


def splits_heads(weight: Any, layer: LayerKV, mesh: Mesh) -> bool:
    """Return whether each device has the queries, keys and values of the same heads, and these heads of the cache."""
    devices = mesh.shape["model"]
    return (
        isinstance(weight, KernelWeight)
        and weight.codes.shape[0] == devices
        and layer.entries.shape[2] % devices == 0
    )


def attend(
    op: Callable[[jax.Array, LayerKV, Positions], tuple[jax.Array, LayerKV]],
    qkv: jax.Array,
    layer: LayerKV,
    positions: Positions,
    mesh: Mesh,
) -> tuple[jax.Array, LayerKV]:
    """Run `op` on every device's heads, where `splits_heads`.

    Args:
      op: attention of one token a sequence, of a device's queries, keys and values, its part of the cache, and
        positions.
      qkv: `[b, all_heads · d]`, of each device's heads one after the other.
      layer: a cache with its heads over `model`.
      positions: of all rows, or of each.
      mesh: with an axis `model`.

    Returns:
      The mix of the values `[b, heads · d]`, and the cache with the token.
    """
    batch = _over_data(len(qkv), mesh) if len(qkv) == layer.entries.shape[1] else None
    by_row = P(batch) if positions.query.ndim > 1 else P()
    where = Positions(query=by_row, key=P(), cos=by_row, sin=by_row)  # pyright: ignore[reportArgumentType]
    stores, mixed = P(None, batch, "model"), P(batch, "model")
    return jax.shard_map(
        op, mesh=mesh, in_specs=(mixed, stores, where), out_specs=(mixed, stores), check_vma=False
    )(qkv, layer, positions)


def whole(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Return x with its last axis whole on every device, and its batch over `data`."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(_over_data(len(x), mesh))))


def per_token(op: Callable[[Any], Any], x: jax.Array, mesh: Mesh) -> Any:
    """Run `op` on whole tokens, on every device that has them."""
    batch = P(_over_data(len(x), mesh))
    return jax.shard_map(op, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)(x)


def place_cache(cache: KVCache, mesh: Mesh) -> KVCache:
    """Return the cache with its heads over `model` and its batch over `data`, as far as these divide."""

    def place(leaf):
        divides = leaf.shape[2] % mesh.shape["model"] == 0
        spec = P(None, _over_data(leaf.shape[1], mesh), "model" if divides else None)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return dataclasses.replace(cache, layers=jax.tree.map(place, cache.layers))


def _own(weight: Any) -> Any:
    """Return a device's share of a weight, without the axis of shares."""
    return jax.tree.map(lambda leaf: leaf[0], weight)


def _shares(weight: Any) -> int:
    return jax.tree.leaves(weight)[0].shape[0]


def _batch(x: Any) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def _over_data(batch: int, mesh: Mesh) -> str | None:
    devices = mesh.shape.get("data", 0)
    return "data" if devices and batch % devices == 0 else None


def _over_model(shares: int) -> str | None:
    return None if shares == 1 else "model"
