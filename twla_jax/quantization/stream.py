"""The residual stream of all calibration windows, between two blocks, in batches of one shape."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.core.tensors import take_rows
from twla_jax.models import sharding
from twla_jax.models.decoder import Decoder

_BATCH_TOKENS = 8192  # tokens that go through a block at a time
_DEVICE_SHARE = 0.4  # of the device's memory that the stream may take before it moves to the host


class ResidualStream:
    """Kept on the device where it fits, and on the host, batch by batch moved to the device, where not.

    Attributes:
      tokens: how many there are in all windows.
      positions: of the tokens of one window.
    """

    def __init__(self, model: Decoder, windows: np.ndarray, mesh: jax.sharding.Mesh | None):
        count, seq_len = windows.shape
        split = mesh.shape["data"] if mesh is not None else 1
        size = -(-max(1, min(count, _BATCH_TOKENS // seq_len)) // split) * split
        self.tokens = windows.size
        self.positions = model.positions(seq_len)
        self._embed = model.embed.get_value()
        self._sharding = sharding.batch_sharding(mesh) if mesh is not None else None
        self._count = count
        # The last batch is filled up, so that nothing compiles twice.
        filled = np.pad(windows, ((0, -count % size), (0, 0)))
        self._windows = filled.reshape(-1, size, seq_len)
        self._real = (np.arange(len(filled)) < count).astype(np.float32).reshape(-1, size)
        self._dtype = model.dtype
        self._state: list[dict[str, Any]] = []
        needed = (
            filled.size
            * self._dtype.itemsize
            * (model.config.hidden_size + model.config.num_heads * model.config.head_dim)
        )
        limit = _device_bytes()
        self._on_host = limit is not None and needed > _DEVICE_SHARE * limit * split

    def start(self) -> None:
        """Embeds the windows."""
        table = jax.tree.map(jnp.asarray, self._embed)
        self._state = [
            {"x": self._keep(self._put(take_rows(table, jnp.asarray(batch), self._dtype))), "mixed": None}
            for batch in self._windows
        ]

    def restore(self, x: np.ndarray) -> None:
        """Puts back what `collect` gave."""
        filled = np.zeros((self._windows.shape[0] * self._windows.shape[1], *x.shape[1:]), x.dtype)
        filled[: self._count] = x
        batches = filled.reshape(*self._windows.shape[:2], *x.shape[1:])
        self._state = [
            {"x": batch if self._on_host else self._put(batch), "mixed": None} for batch in batches
        ]

    def collect(self) -> np.ndarray:
        """The residual stream on the host, `[windows, s, d]`."""
        return np.concatenate([np.asarray(batch["x"]) for batch in self._state])[: self._count]

    def batches(self) -> Iterator[tuple[dict[str, Any], jax.Array]]:
        """Every batch, to be changed by the caller, and which of its windows are real."""
        for state, real in zip(self._state, self._real, strict=True):
            batch = {name: None if array is None else self._put(array) for name, array in state.items()}
            # The caller donates what it is given, so the old arrays are not held here meanwhile.
            state.clear()
            yield batch, self._put(real)
            state.update({name: self._keep(array) for name, array in batch.items()})

    def _put(self, array: Any) -> jax.Array:
        return jnp.asarray(array) if self._sharding is None else jax.device_put(array, self._sharding)

    def _keep(self, array: Any) -> Any:
        return np.asarray(array) if self._on_host and array is not None else array


def _device_bytes() -> int | None:
    """Memory of the first device, where it is not the host's own."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
