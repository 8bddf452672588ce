"""The residual stream of all calibration windows, between two blocks, in batches of one shape."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.core.tensors import take_rows
from twla_jax.models import sharding
from twla_jax.models.blocks import State
from twla_jax.models.decoder import Decoder

_BATCH_TOKENS = 8192  # tokens that go through a block at a time
_DEVICE_SHARE = 0.4  # of the device's memory that the stream may take before it moves to the host


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
    """Kept on the device where it fits, and on the host, batch by batch moved to the device, where not.

    Attributes:
      tokens: how many there are in all windows.
      context: of the tokens of one window, for all layers.
    """

    def __init__(self, model: Decoder, windows: np.ndarray, mesh: jax.sharding.Mesh | None):
        count, seq_len = windows.shape
        split = mesh.shape["data"] if mesh is not None else 1
        size = -(-max(1, min(count, _BATCH_TOKENS // seq_len)) // split) * split
        self.tokens = windows.size
        self.context = model.context(seq_len)
        self._embed = model.embed.get_value()
        self._sharding = sharding.batch_sharding(mesh) if mesh is not None else None
        self._count = count
        # The last batch is filled up, so that nothing compiles twice.
        filled = np.pad(windows, ((0, -count % size), (0, 0)))
        self._windows = filled.reshape(-1, size, seq_len)
        self._real = (np.arange(len(filled)) < count).astype(np.float32).reshape(-1, size)
        self._dtype = model.dtype
        self._states: list[State | None] = []
        needed = filled.size * self._dtype.itemsize * (model.config.hidden_size + _widest_kept(model))
        limit = _device_bytes()
        self._on_host = limit is not None and needed > _DEVICE_SHARE * limit * split

    def start(self) -> None:
        """Embed the windows."""
        table = jax.tree.map(jnp.asarray, self._embed)
        self._states = [
            State(self._keep(self._put(take_rows(table, jnp.asarray(batch), self._dtype))))
            for batch in self._windows
        ]

    def restore(self, x: np.ndarray) -> None:
        """Put back what `collect` gave."""
        filled = np.zeros((self._windows.shape[0] * self._windows.shape[1], *x.shape[1:]), x.dtype)
        filled[: self._count] = x
        batches = filled.reshape(*self._windows.shape[:2], *x.shape[1:])
        self._states = [State(batch if self._on_host else self._put(batch)) for batch in batches]

    def collect(self) -> np.ndarray:
        """Return the residual stream on the host, `[windows, s, d]`."""
        return np.concatenate([np.asarray(state.x) for state in self._states if state])[: self._count]

    def batches(self) -> Iterator[Batch]:
        """Yield every batch; the state that the caller leaves in it takes the old one's place."""
        for index, real in enumerate(self._real):
            batch = Batch(jax.tree.map(self._put, self._states[index]), self._put(real))
            # The caller donates what it is given, so the old arrays are not held here meanwhile.
            self._states[index] = None
            yield batch
            self._states[index] = jax.tree.map(self._keep, batch.state)

    def _put(self, array: Any) -> jax.Array:
        return jnp.asarray(array) if self._sharding is None else jax.device_put(array, self._sharding)

    def _keep(self, array: Any) -> Any:
        return np.asarray(array) if self._on_host else array


def _widest_kept(model: Decoder) -> int:
    """Return the width of the widest input of a site that the stream holds beside itself."""
    kept = (site for site in model.sites if not site.recomputed)
    return max(model.blocks.linears(site)[0].features[0] for site in kept)


def _device_bytes() -> int | None:
    """Return the memory of the first device, where it is not the host's own."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
