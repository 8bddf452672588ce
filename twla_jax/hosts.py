"""Lets several processes, one on each host, work as one: all make the same calls in the same order, on one mesh.

On one host every function here does what plain JAX does, and none of them talks to anyone.
"""

import contextlib
import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from twla_jax.errors import TwlaError

# A host that is done waits for the first one to check and save. One that died is noticed much sooner, by its silence.
_PATIENCE = 24 * 3600  # seconds


def join(text: str) -> None:
    """Make the devices of several hosts one set, before anything is computed; every host runs the same command.

    Args:
      text: `auto` on Cloud TPU, SLURM and others that JAX knows; else `HOST:PORT,N,I`: the address of process 0, how
        many there are, and which one this is.

    Raises:
      TwlaError: it is neither, or the others are not reached.
    """
    known: dict[str, Any] = {}
    if text != "auto":
        address, *numbers = text.split(",")
        if len(numbers) != 2 or ":" not in address or not all(each.isdecimal() for each in numbers):
            raise TwlaError(f"--coordinator {text[:80]}: must be auto or HOST:PORT,N,I, as 10.0.0.1:1234,2,0")
        count, index = map(int, numbers)
        if not index < count:
            raise TwlaError(f"--coordinator {text[:80]}: process {index} of {count}; they count from 0")
        known = {"coordinator_address": address, "num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(**known, shutdown_timeout_seconds=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise TwlaError(f"--coordinator {text[:80]}: {' '.join(str(error).split())[:200]}") from None


def several() -> bool:
    """Return whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Return whether this is the process that writes and prints; of one host alone, it is."""
    return not several() or jax.process_index() == 0


def put(tree: Any, shardings: Any) -> Any:
    """Return a pytree of arrays on devices as `shardings` says.

    Args:
      tree: arrays of this host, the same on all, of which a device takes no more than its part; or arrays that lie on
        the devices of all hosts.
      shardings: the same pytree, or one sharding for all.
    """
    if isinstance(shardings, Sharding):
        return jax.tree.map(functools.partial(_put, sharding=shardings), tree)
    return jax.tree.map(lambda leaf, sharding: _put(leaf, sharding), tree, shardings)


def _put(array: Any, sharding: Sharding) -> jax.Array:
    """Return one array on devices. `jax.device_put` would send all of it to every host, to compare."""
    if sharding.is_fully_addressable or _is_elsewhere(array):
        return jax.device_put(array, sharding)
    here = np.asarray(array)
    return build(lambda index: here[index], here.shape, sharding)


def beside(array: Any, other: Any) -> Any:
    """Return an array, whole on every device of all hosts if `other` lies on devices of several."""
    if not _is_elsewhere(other):
        return array
    return _put(array, NamedSharding(other.sharding.mesh, PartitionSpec()))


def build(read: Callable[[Any], np.ndarray], shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """Return an array on the devices of all hosts, each of which reads the parts of its own devices, one by one.

    Args:
      read: returns a part from its slices of the whole.
      shape: of the whole.
      sharding: of the whole.
    """
    places = sharding.addressable_devices_indices_map(shape)
    parts = [jax.device_put(read(index), device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Holds on this host what its devices held of one array.

    Attributes:
      shape: of the whole array.
      sharding: that it had, and is to have again.
      by_place: the part of each place in the array; devices with the same part have it once.
    """

    shape: tuple[int, ...]
    sharding: Sharding
    by_place: dict[str, np.ndarray]

    @classmethod
    def of(cls, array: jax.Array, keep: Callable[[Any], np.ndarray] = np.asarray) -> "Parts":
        """Return the parts of an array that lie on this host's devices, each as `keep` returns it."""
        shards = {str(shard.index): shard for shard in array.addressable_shards}
        parts = {place: keep(shard.data) for place, shard in shards.items()}
        return cls(array.shape, array.sharding, parts)

    def on_devices(self) -> jax.Array:
        """Return the array on the devices of all hosts, each of which brings its own parts."""
        return build(lambda index: self.by_place[str(index)], self.shape, self.sharding)


def fetch(tree: Any) -> Any:
    """Return a pytree on this host, on every host the same; arrays that lie on others' devices, too, come whole."""
    return jax.device_get(whole(tree))


def whole(tree: Any) -> Any:
    """Return a pytree of which every host holds all: arrays that were split over hosts come to each of them."""
    leaves, structure = jax.tree.flatten(tree)
    split = [index for index, leaf in enumerate(leaves) if _is_elsewhere(leaf)]
    if split:
        gathered = _gather(leaves[split[0]].sharding.mesh)([leaves[index] for index in split])
        for index, array in zip(split, gathered, strict=True):
            leaves[index] = array.addressable_data(0)
    return jax.tree.unflatten(structure, leaves)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    """Return a compiled function that copies arrays to every device; one program for a list of them."""
    return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _is_elsewhere(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def from_first[T](find: Callable[[], T]) -> T:
    """Return what `find` returns in the first process, in every process; the others do not call it.

    Args:
      find: returns what can be pickled, arrays on the host among it.

    Raises:
      TwlaError: `find` raised it, in every process.
    """
    if not several():
        return find()
    said, error = b"", None
    if is_first():
        try:
            said = pickle.dumps((True, find()))
        except TwlaError as refused:
            error, said = refused, pickle.dumps((False, str(refused)))
    length = np.frombuffer(len(said).to_bytes(8, "little"), np.uint8)  # JAX has no integers of 64 bits
    size = int.from_bytes(multihost_utils.broadcast_one_to_all(length).tobytes(), "little")
    sent = np.frombuffer(said, np.uint8) if is_first() else np.zeros(size, np.uint8)
    fine, value = pickle.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())
    if not fine:
        raise error or TwlaError(value)
    return value


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process write files by itself, while the others wait for it.

    Orbax asks JAX how many processes there are. Of several, it waits for all of them to write, and refuses arrays that
    lie on one.
    """
    with mock.patch.object(jax, "process_count", return_value=1):
        yield


def require_same(digest: str, what: str) -> None:
    """Refuse to go on where the hosts do not have the same.

    Args:
      digest: hexadecimal, of what they should have in common.
      what: its name in the message.

    Raises:
      TwlaError: a host has another one.
    """
    if several():
        every = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
        if others := np.flatnonzero((every != every[0]).any(axis=1)).tolist():
            raise TwlaError(f"the hosts differ in {what}: process 0 has another than {others}")
