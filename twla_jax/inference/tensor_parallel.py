"""Runs kernels on a mesh: each device multiplies its own rows of a weight by an input that every device has whole.

The partitioner cannot look into a kernel, so kernels run under `jax.shard_map`, over the mesh that
`twla_jax.shardings` is for: weights over its axis `model`, batches over `data`. Every linear is split by its outputs,
o and down too: the rotation before them mixes all columns of their input, which must come together for that anyway. No
sum crosses devices, so the outcome does not depend on how many there are.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from twla_jax.core.tensors import TernaryTensor
from twla_jax.ops.attention.kv_cache import KVCache
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

    def share(leaf, index):
        rows = leaf.shape[0] // shares
        return leaf[index * rows : (index + 1) * rows]

    stacked = [
        kernel_weight(*jax.tree.map(lambda leaf, i=index: share(jnp.asarray(leaf), i), (weights, biases)))
        for index in range(shares)
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked)
    return jax.device_put(stack, NamedSharding(mesh, P(_over_model(shares))))


def matmul(
    op: Callable[[Any, KernelWeight], jax.Array], x: Any, weight: KernelWeight, mesh: Mesh
) -> jax.Array:
    """Run `op` on every device's rows.

    Args:
      op: the product that each device runs on its rows.
      x: a pytree of arrays `[b, ...]`.
      weight: from `sharded_weight`.
      mesh: with an axis `model`.

    Returns:
      `[b, t, shares · rows]`: the outputs of each device's share, one share after the other.
    """
    batch, shares = _over_data(_batch(x), mesh), weight.codes.shape[0]
    return jax.shard_map(
        lambda x, weight: op(x, jax.tree.map(lambda leaf: leaf[0], weight)),
        mesh=mesh,
        in_specs=(P(batch), P(_over_model(shares))),
        out_specs=P(batch, None, _over_model(shares)),
        check_vma=False,
    )(x, weight)


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


def _batch(x: Any) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def _over_data(batch: int, mesh: Mesh) -> str | None:
    devices = mesh.shape.get("data", 0)
    return "data" if devices and batch % devices == 0 else None


def _over_model(shares: int) -> str | None:
    return None if shares == 1 else "model"
