"""Moves the parameters of a model between memory and the disk: every array by its name, codes packed closer there."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from twla_jax import hosts
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.core.grouped_tensor import GroupedTensor
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.tensors import IntegerTensor, TernaryTensor
from twla_jax.errors import TwlaError
from twla_jax.models.decoder import Decoder
from twla_jax.models.stored_layers import StoredLayers
from twla_jax.storage import layered_arrays
from twla_jax.storage.codec import codec_of, pack_stored, unpack_stored
from twla_jax.storage.manifest import MANIFEST, array_name

# How a parameter that is no plain array is told apart in the manifest. Its static fields are kept there by name.
_KINDS: dict[str, type] = {
    "ternary": TernaryTensor,
    "integer": IntegerTensor,
    "grouped": GroupedTensor,
    "rotation": KroneckerRotation,
    "activation": ActivationQuantizer,
}
_ARRAY = "array"
# Orbax reads none of these back. They hold the run's path, time and device, so that the same model gave other bytes.
_UNREAD = ("commit_success.txt", "_CHECKPOINT_METADATA", "_sharding")


def to_stored(model: Decoder, only: type = object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays that go to disk by name, and the manifest's account of the parameters they make up."""
    arrays, tensors = {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, value = ".".join(map(str, path)), variable.get_value()
        if not isinstance(value, only):
            continue
        kind = next((kind for kind, cls in _KINDS.items() if isinstance(value, cls)), _ARRAY)
        static, parts = {}, {"": value}
        if kind != _ARRAY:
            fields = dataclasses.fields(value)
            static = {
                field.name: getattr(value, field.name) for field in fields if field.metadata.get("static")
            }
            values = {field.name: getattr(value, field.name) for field in fields if field.name not in static}
            parts = {part: array for part, array in values.items() if array is not None}
        for part, array in parts.items():
            if codec := codec_of(kind, static, part):
                pack = layered_arrays.packed if isinstance(array, StoredLayers) else pack_stored
                parts[part] = pack(array, codec)
            arrays[array_name(name, part)] = parts[part]
        tensors[name] = {
            "kind": kind,
            "static": static,
            "arrays": {
                part: {"shape": list(a.shape), "dtype": jnp.dtype(a.dtype).name} for part, a in parts.items()
            },
        }
    return arrays, tensors


def write(folder: Path, arrays: dict[str, Any]) -> None:
    """Write arrays by name to `folder`, which nothing is in, so that the same arrays give the same bytes."""
    with hosts.alone(), _checkpointer() as checkpointer:
        _undisturbed(functools.partial(checkpointer.save, folder, layered_arrays.first_layers(arrays)))
    layered_arrays.append_layers(folder, arrays)
    for name in _UNREAD:
        (folder / name).unlink(missing_ok=True)


def describe(model: Decoder, tensors: dict[str, Any], source: Path) -> None:
    """Put abstract parameters as the manifest describes them into an abstract model.

    Raises:
      TwlaError: a parameter that the model does not have or that is missing, or one of another size.
    """
    before = {
        ".".join(map(str, path)): variable.get_value().shape
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    if missing := before.keys() - tensors.keys():
        raise TwlaError(f"{source}: describes no {min(missing)}; the folder is damaged")
    for name, entry in tensors.items():
        try:
            value = _abstract(entry)
            _assign(model, name, value)
        except (AttributeError, TypeError, ValueError, KeyError):
            raise TwlaError(f"{source}: describes {name[:100]!r}, which is no part of the model") from None
        if name in before and sorted(before[name]) != sorted(value.shape):
            raise TwlaError(f"{source}: {name} is {list(value.shape)}, the model's {list(before[name])}")


def restore(model: Decoder, params: Path, tensors: dict[str, Any], mesh: jax.sharding.Mesh | None) -> None:
    """Fill the abstract parameters of `model` from the orbax checkpoint."""
    state = nnx.state(model, nnx.Param)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if mesh is None:
        placed = jax.tree.map(lambda _: single, state)
    else:
        from twla_jax.models.sharding import shardings

        placed = shardings(state, mesh)
    targets = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(placed)}
    wanted = {}
    for name, entry in tensors.items():
        for part, a in entry["arrays"].items():
            sharding = targets[name] if part == "" else getattr(targets[name], part)
            if codec_of(entry["kind"], entry["static"], part):
                sharding = _stored_sharding(a["shape"], mesh) or single
            wanted[array_name(name, part)] = jax.ShapeDtypeStruct(
                tuple(a["shape"]), jnp.dtype(a["dtype"]), sharding=sharding
            )
    with _checkpointer() as checkpointer:
        try:
            options = ocp.checkpoint_utils.construct_restore_args(wanted)
            arrays = _undisturbed(
                functools.partial(checkpointer.restore, params, item=wanted, restore_args=options)
            )
        except (ValueError, TypeError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TwlaError(f"{params}: cannot be read as {MANIFEST} describes it ({reason})") from None
    for name, entry in tensors.items():
        parts = {part: arrays.pop(array_name(name, part)) for part in entry["arrays"]}
        for part, stored in parts.items():
            if codec := codec_of(entry["kind"], entry["static"], part):
                placed = getattr(targets[name], part)
                parts[part] = jax.jit(unpack_stored, static_argnums=1, out_shardings=placed)(stored, codec)
        value = parts[""] if entry["kind"] == _ARRAY else _KINDS[entry["kind"]](**parts, **entry["static"])
        _assign(model, name, value)


def _abstract(entry: dict[str, Any]) -> Any:
    """Return a parameter of `jax.ShapeDtypeStruct`s as it will be in memory, codes at 2 bits."""
    parts = {
        part: jax.ShapeDtypeStruct(tuple(a["shape"]), jnp.dtype(a["dtype"]))
        for part, a in entry["arrays"].items()
    }
    if entry["kind"] == _ARRAY:
        return parts[""]
    for part, stored in parts.items():
        if codec := codec_of(entry["kind"], entry["static"], part):
            parts[part] = jax.ShapeDtypeStruct((*stored.shape[:-1], codec.width), stored.dtype)
    return _KINDS[entry["kind"]](**parts, **entry["static"])


def _stored_sharding(shape: list[int], mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding | None:
    """Return rows over `model` where they divide: bytes of five trits cannot be cut where 2-bit tiles are, rows can."""
    if mesh is None:
        return None
    divides = shape[-2] % mesh.shape["model"] == 0
    spec = [None] * (len(shape) - 2) + ["model" if divides else None, None]
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def _assign(model: Decoder, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    module = functools.reduce(getattr, parents, model)
    # nnx.data: a rotation may land where the full-precision model has None
    setattr(module, last, nnx.data(nnx.Param(value)))


def _undisturbed(call: Callable[[], Any]) -> Any:
    """Return what a call gives, made in another thread; Ctrl-C is raised once it is over.

    Orbax works in threads of its own. Interrupted in the middle, each of them prints a traceback.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # a thread that an interrupt meets as it begins is not waited for
        return pool.submit(call).result()


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.PyTreeCheckpointer]:
    """Yield a checkpointer that writes one uncompressed file an array: the disk then holds what the accounting says.

    Orbax's log is held back: it would print every thread's traceback of the one error that is raised, too.
    """
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=False, use_compression=False) as checkpointer:
            yield checkpointer
    finally:
        log.setLevel(level)
