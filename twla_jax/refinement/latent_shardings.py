"""Places latents and optimiser states on a mesh, each beside the codes and scales that it stands for."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twla_jax import hosts
from twla_jax.models.decoder import Decoder
from twla_jax.models.sharding import shardings
from twla_jax.refinement.latents import Latents


def place_latents(latents: Latents, student: Decoder, mesh: Mesh | None) -> Latents:
    """Return the latents of a student on its mesh; as they are where there is none."""
    return place_state(latents, student, mesh)


def place_state(state: Any, student: Decoder, mesh: Mesh | None) -> Any:
    """Return a tree that holds latents by name, as optimisers do, each with its matrix on the mesh.

    u is split as the codes are, scales as α; all else is whole on every device.

    Args:
      state: any pytree; what lies under `q`, `u` is a latent u of q.
      student: on the mesh.
      mesh: None leaves the state as it is.
    """
    if mesh is None:
        return state
    placed = shardings(student.blocks, mesh)
    linears = {name for site in student.sites for name in site.linears}
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> Any:
        *_, name, part = [None, None, *(getattr(key, "key", None) for key in path)]
        if name not in linears:
            return hosts.put(leaf, whole)
        kernel = getattr(placed, name).kernel.get_value()
        where = kernel.codes if part == "u" else kernel.alpha
        return hosts.put(leaf, where if leaf.ndim == len(where.spec) else whole)

    return jax.tree_util.tree_map_with_path(place, state)
