"""Says where each array of a model lives on a mesh with axes `data` and `model`.

Linears that read the residual stream (as q, k, v, gate, up) are split by outputs, those that write it (as o, down) by
inputs: one sum over `model` after each pair. Which do what is the sites' to say (`Site.writes`). An array whose axis
does not divide is kept whole on every device.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from twla_jax import hosts
from twla_jax.core import packing
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.core.grouped_tensor import GroupedTensor
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.tensors import IntegerTensor, TernaryTensor
from twla_jax.devices import on_device
from twla_jax.errors import TwlaError
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.families import FAMILIES
from twla_jax.models.stored_layers import StoredLayers

AXES = ("data", "model")


def make_mesh(text: str) -> Mesh:
    """Return the mesh that a text as `data=2,model=4` names, over the first devices; an axis that is left out is 1.

    Raises:
      TwlaError: another axis, one that is named twice, no positive whole number, or more devices than there are.
    """
    sizes, named = dict.fromkeys(AXES, 1), set()
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or axis in named or not size.isdecimal() or not 1 <= int(size) <= 2**20:
            raise TwlaError(f"--mesh {text[:80]}: must be like data=2,model=4, with whole numbers from 1 on")
        named.add(axis)
        sizes[axis] = int(size)
    count, devices = math.prod(sizes.values()), jax.devices()
    if count > len(devices):
        raise TwlaError(f"--mesh {text[:80]}: needs {count} devices, but there are {len(devices)}")
    if jax.process_count() > 1 and count < len(devices):
        raise TwlaError(f"--mesh {text[:80]}: must take the {len(devices)} devices of all hosts, not {count}")
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:count])


def place(model: Any, mesh: Mesh | None) -> Any:
    """Return a model on the default device, or each leaf on a mesh as `shardings` says; one that is there stays.

    Args:
      model: a decoder or a block; its leaves may be on the host, in files or on devices.
      mesh: None for the default device.
    """
    if mesh is None:
        return on_device(model)
    devices = set(mesh.devices.flat)
    if len(devices) > 1 and any(_devices(leaf) == devices for leaf in jax.tree.leaves(model)):
        return model
    model = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, StoredLayers) else leaf, model)
    return hosts.put(model, shardings(model, mesh))


def place_everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Return a pytree of arrays on the default device, or whole on every device of a mesh."""
    return on_device(tree) if mesh is None else hosts.put(tree, NamedSharding(mesh, PartitionSpec()))


def place_batch(array: Any, mesh: Mesh | None) -> jax.Array:
    """Return an array on the default device, or on a mesh with its leading axis over `data`."""
    return jnp.asarray(array) if mesh is None else hosts.put(array, batch_sharding(mesh))


def batch_on(mesh: Mesh | None, size: int) -> int:
    """Return the least batch of at least `size` that the axis `data` divides."""
    split = 1 if mesh is None else mesh.shape["data"]
    return -(-size // split) * split


def require_split(batch: int, mesh: Mesh | None) -> None:
    """Refuse a batch of windows that cannot be split over the axis `data`.

    Raises:
      TwlaError: the mesh does not divide it.
    """
    if mesh is not None and batch % mesh.shape["data"]:
        raise TwlaError(f"--mesh: batches of {batch} windows cannot be split over data={mesh.shape['data']}")


def _devices(leaf: Any) -> set[Any]:
    return leaf.sharding.device_set if isinstance(leaf, jax.Array) else set()


def shardings(model: Any, mesh: Mesh) -> Any:
    """Return the sharding of every leaf of a decoder, quantised or not.

    Args:
      model: a `Decoder`, a block or an `nnx.State` of either; arrays or `jax.ShapeDtypeStruct`s.
      mesh: with an axis `model`, and usually `data`, over which batches go.

    Returns:
      The same pytree with a `NamedSharding` for every array: for `jax.device_put`, `jax.jit` and orbax.
    """
    return jax.tree_util.tree_map_with_path(
        functools.partial(_sharding, mesh=mesh, by_input=_writers(model)),
        model,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose leading axis is the batch: split over `data`, whole over `model`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def _writers(model: Any) -> frozenset[str]:
    """Return the names of the linears that write the residual stream: the model's, or of a state, any family's."""
    block = getattr(model, "blocks", model)
    known = {type(block)} if isinstance(block, ChainBlock) else {family.block for family in FAMILIES.values()}
    return frozenset(name for each in known for site in each.sites if site.writes for name in site.linears)


def _sharding(path: tuple, variable: Any, *, mesh: Mesh, by_input: frozenset[str]) -> Any:
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
    place = functools.partial(_place, mesh=mesh)
    splits_inputs = not by_input.isdisjoint(names)
    if isinstance(value, IntegerTensor):
        result = jax.tree.map(lambda leaf: place(leaf, -2), value)
    elif isinstance(value, GroupedTensor):  # its mask of columns has no axis of rows: whole on every device
        result = jax.tree.map(lambda leaf: place(leaf, None), value)
    elif isinstance(value, TernaryTensor):
        result = _ternary(value, splits_inputs, mesh)
    elif isinstance(value, KroneckerRotation | ActivationQuantizer):
        result = jax.tree.map(lambda leaf: place(leaf, None), value)
    elif names[-1] == "kernel":  # [.., in, out]
        result = place(value, -2 if splits_inputs else -1)
    elif names[-1] == "bias":
        result = place(value, None if splits_inputs else -1)
    elif names[-1] == "embed":
        result = place(value, 0)
    else:
        result = place(value, None)
    return variable.replace(result) if isinstance(variable, nnx.Variable) else result


def _ternary(value: TernaryTensor, by_input: bool, mesh: Mesh) -> TernaryTensor:
    """Return shardings of codes, α and μ, split alike, so that no device needs another's scales to unpack its codes."""
    axis = -2
    if by_input and _inputs_divide(value, mesh.shape["model"]):
        axis = -1
    return jax.tree.map(lambda leaf: _place(leaf, axis, mesh=mesh), value)


def _inputs_divide(value: TernaryTensor, parts: int) -> bool:
    """Return whether a split of the columns cuts between packed tiles and between groups."""
    columns = value.in_features // parts
    return (
        value.in_features % (parts * packing.TILE) == 0
        and columns % value.group_size == 0
        and value.alpha.shape[-1] % parts == 0
    )


def _place(array: Any, axis: int | None, *, mesh: Mesh) -> NamedSharding:
    spec: list[str | None] = [None] * len(array.shape)
    if axis is not None and array.shape[axis] % mesh.shape["model"] == 0:
        spec[axis] = "model"
    return NamedSharding(mesh, PartitionSpec(*spec))
