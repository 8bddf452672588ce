"""Says where slots lie on a mesh that a model is split over."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twla_jax.errors import TwlaError
from twla_jax.ops.attention.kv_cache import KVCache
from twla_jax.serving.slots import Slots, batch_axis


def mesh_of(leaves: list[jax.Array]) -> Mesh | None:
    """Return the mesh that some of a model's arrays are on; None for one device.

    Raises:
      TwlaError: as `require_whole_batches`.
    """
    for leaf in leaves:
        if isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1:
            mesh = leaf.sharding.mesh
            assert isinstance(mesh, Mesh)
            require_whole_batches(mesh)
            return mesh
    return None


def require_whole_batches(mesh: Mesh) -> None:
    """Refuse a mesh with an axis `data`.

    Raises:
      TwlaError: it has one, over which slots that come and go are not split.
    """
    if (data := mesh.shape.get("data", 1)) > 1:
        raise TwlaError(
            f"--mesh data={data}: requests are not split over devices; give them all to model, or start {data} servers"
        )


def shardings(state: Slots | KVCache, mesh: Mesh) -> Any:
    """Return the sharding of every array of slots or of a cache: heads over `model` if it divides them, else whole.

    Args:
      state: arrays or their shapes.
      mesh: with an axis `model`.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    cache = state.cache if isinstance(state, Slots) else state
    axis = batch_axis(cache) + 1

    def place(leaf: Any) -> NamedSharding:
        divides = leaf.shape[axis] % mesh.shape["model"] == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model")) if divides else whole

    placed = jax.tree.map(lambda _: whole, state)
    layers = jax.tree.map(place, cache.layers)
    if isinstance(placed, Slots):
        return dataclasses.replace(placed, cache=dataclasses.replace(placed.cache, layers=layers))
    return dataclasses.replace(placed, layers=layers)
