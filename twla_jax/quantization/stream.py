"""Holds the residual stream of all calibration windows, between two blocks, in batches of one shape."""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from twla_jax import hosts
from twla_jax.devices import host_bytes, on_device
from twla_jax.models import sharding
from twla_jax.models.blocks import State
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.models.stored_layers import StoredLayers, without_blocks

BATCH_TOKENS = 8192  # tokens of each device that go through a block at a time
DEVICE_SHARE = 0.4  # of the device's memory that all streams may take before they move to the host
_HOST_SHARE = 0.4  # of the host's memory that they may take there before they move to files


@dataclasses.dataclass
class Batch:
    """Some windows on the device: what is set as `state` is where the stream goes on from.

    Attributes:
      state: between two sites of a block.
      real: `[b]`, 0 for windows that only fill up the batch.
    """

    state: State
    real: jax.Array


class ResidualStream:
    """Holds the streams of all windows, on the device where they fit.

    Else they lie on the host or in a file, from where batches go to the device in turn.

    Attributes:
      tokens: how many there are in all windows.
      windows: `[batches, b, s]`, the last batch filled up with zeros.
      context: of the tokens of one window, for all layers.
      mesh: whose axis `data` the windows of a batch are split over; None has the default device.
    """

    def __init__(
        self,
        model: Decoder,
        windows: np.ndarray,
        mesh: jax.sharding.Mesh | None,
        folder: Path | None = None,
        *,
        streams: int = 1,
    ):
        """Describe the stream; `start` or `restore` fill it.

        Args:
          model: whose embedding the stream begins with.
          windows: tokens, `[w, s]`.
          mesh: as the attribute; of several hosts, each holds the windows of its own devices.
          folder: where the file lies that holds a stream too large for the host's memory; None: where temporary files
            do.
          streams: how many such are held at the same time, this one included.
        """
        count, seq_len = windows.shape
        split = mesh.shape["data"] if mesh is not None else 1
        size = split * max(1, min(-(-count // split), BATCH_TOKENS // seq_len))
        self.tokens = windows.size
        self.mesh = mesh
        self.context = self.everywhere(model.context(seq_len))
        self._embedding = replace(without_blocks(model), head=None)
        self._sharding = sharding.batch_sharding(mesh) if mesh is not None else None
        self._count = count
        # The last batch is filled up, so that nothing compiles twice.
        filled = np.pad(windows, ((0, -count % size), (0, 0)))
        self.windows = filled.reshape(-1, size, seq_len)
        self._real = (np.arange(len(filled)) < count).astype(np.float32).reshape(-1, size)
        self._dtype = model.dtype
        self._states: list[State | None] = []
        needed = (
            streams * filled.size * self._dtype.itemsize * (model.config.hidden_size + widest_kept(model))
        )
        limit = _device_bytes()
        self._on_host = limit is not None and needed > DEVICE_SHARE * limit * split
        room = host_bytes()
        self._in_file = self._on_host and room is not None and needed > _HOST_SHARE * room
        self._folder = folder

    def start(self) -> None:
        """Embed the windows."""
        embedding = on_device(self._embedding)
        self._states = [
            State(self._keep(self._put(embedding.embed_tokens(jnp.asarray(batch))))) for batch in self.windows
        ]

    def everywhere(self, tree: Any) -> Any:
        """Return a pytree of arrays that every device of the mesh holds."""
        return sharding.place_everywhere(tree, self.mesh)

    def restore(self, saved: Float[np.ndarray, "batches b s d"] | StoredLayers) -> None:
        """Put back what `saved` gave, stacked, whatever batches it was in; each is read when its turn comes."""
        if saved.shape[:2] != self.windows.shape[:2]:
            x = np.asarray(saved).reshape(-1, *saved.shape[2:])[: self._count]
            x = np.pad(x, ((0, self.windows.shape[0] * self.windows.shape[1] - self._count), (0, 0), (0, 0)))
            saved = x.reshape(*self.windows.shape[:2], *x.shape[1:])
        self._states = [State(self._keep(batch) if self._on_host else self._put(batch)) for batch in saved]

    def saved(self) -> list[np.ndarray]:
        """Return the residual stream between two blocks, a `[b, s, d]` a batch, on the host.

        Of several hosts, all send their windows to the first one; the others return nothing.

        The arrays stay as they are, also while the stream moves on: on the host they are the stream's own.
        """
        arrays: list[Any] = [state.x for state in self._states if state]
        if hosts.several():
            parts = (hosts.whole(self._put(array)) for array in arrays)
            return [np.array(part) for part in parts if hosts.is_first()]
        if self._on_host:
            return arrays
        for array in arrays:
            array.copy_to_host_async()
        # On a CPU the copy would be the array itself, which is donated when the stream moves on.
        return [np.array(array) if jax.default_backend() == "cpu" else np.asarray(array) for array in arrays]

    def batches(self) -> Iterator[Batch]:
        """Yield every batch; the state that the caller leaves in it takes the old one's place."""
        for index, real in enumerate(self._real):
            batch = Batch(jax.tree.map(self._put, self._states[index]), self._put(real))
            # The caller donates what it is given, so the old arrays are not held here meanwhile.
            self._states[index] = None
            yield batch
            self._states[index] = jax.tree.map(self._keep, batch.state)

    def _put(self, array: Any) -> jax.Array:
        if isinstance(array, hosts.Parts):
            return array.on_devices()
        return jnp.asarray(array) if self._sharding is None else hosts.put(array, self._sharding)

    def _keep(self, array: Any) -> Any:
        if not self._on_host:
            return array
        keep = functools.partial(_to_file, folder=self._folder) if self._in_file else np.asarray
        if hosts.several() and self._sharding is not None:
            return hosts.Parts.of(self._put(array), keep)
        return keep(np.asarray(array))


def _to_file(array: np.ndarray, folder: Path | None) -> np.ndarray:
    """Return the array mapped from a file that has no name and goes with it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(np.ascontiguousarray(array).view(np.uint8))
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)


def widest_kept(model: Decoder) -> int:
    """Return the width of the widest input of a site that the stream holds beside itself."""
    kept = (site for site in model.sites if not site.recomputed)
    return max(model.blocks.linears(site)[0].features[0] for site in kept)


def kept_beside(model: Decoder, index: int) -> int:
    """Return the width of what the stream holds beside itself at site `index`, where its linears read that instead."""
    sites = model.sites
    index = max((i for i in range(index + 1) if not sites[i].recomputed), default=0)
    if index == 0 or sites[index].norm is not None:
        return 0
    return model.blocks.linears(sites[index])[0].features[0]


def _device_bytes() -> int | None:
    """Return the memory of this host's first device, where it is not the host's own."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
