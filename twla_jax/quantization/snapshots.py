"""Keeps finished blocks and the residual streams between them on the disk, while the next block is quantised."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np

from twla_jax import hosts
from twla_jax.models.stored_layers import StoredLayers
from twla_jax.quantization.stream import ResidualStream
from twla_jax.storage import resume

_STREAM, _LAYER = "stream", "layer"


class Snapshots:
    """Writes to a working folder by a second thread, in order; to be used as a context, which waits for the thread.

    A finished block is always kept. The streams are kept after every block too, in place of those of an earlier one
    only once they are whole; a disk that takes longer for them than a block takes gets those of every few blocks.

    Of several hosts, each keeps the blocks in a folder of its own, and the first one also the streams of all; what it
    kept is what all of them go on from.
    """

    def __init__(self, store: resume.WorkDir | None):
        """Write to `store`; None keeps nothing."""
        self._store = store
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._pending: list[Future] = []
        self._streams: Future | None = None
        self._failed = False

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown(wait=True)
        if error is None:
            self._raise_errors()

    def load(self) -> tuple[int, dict[str, StoredLayers]] | None:
        """Return the block to go on with and the streams before it by name; None where nothing was kept.

        Batches of a stream, `[batches, b, s, d]`, are read when their turn comes: there may be no room for all.
        """
        store = self._store
        names = None if store is None else hosts.from_first(lambda: store.names(_STREAM))
        if store is None or names is None:
            return None
        batches: dict[str, list[str]] = {}
        for name in names:
            if name != _LAYER:
                batches.setdefault(name.partition("-")[0], []).append(name)

        def stream(names: list[str]) -> StoredLayers:
            def read(index: int) -> np.ndarray:
                return hosts.from_first(lambda: store.require(_STREAM, names[index])[names[index]])

            one = read(0)
            return StoredLayers(read, (len(names), *one.shape), one.dtype)

        first = hosts.from_first(lambda: int(store.require(_STREAM, _LAYER)[_LAYER]))
        return first, {name: stream(parts) for name, parts in batches.items()}

    def block(self, index: int) -> dict[str, np.ndarray]:
        """Return what was kept for a finished block; of several hosts, the others keep what the first one has."""
        store, name = self._store, f"block-{index}"
        assert store is not None
        result = hosts.from_first(lambda: store.require(name))
        if not hosts.is_first():
            store.save(name, result)
        return result

    def keep_block(self, index: int, result: Mapping[str, np.ndarray]) -> None:
        """Keep what was found for one block."""
        self._submit(f"block-{index}", dict(result))

    def keep_streams(self, layer: int, streams: Mapping[str, ResidualStream | None]) -> None:
        """Keep the streams as they are before the block `layer`, unless others are still being written."""
        if self._store is None or hosts.from_first(self._is_busy):
            return
        saved: dict[str, Any] = {_LAYER: np.asarray(layer)}
        for name, stream in streams.items():
            if stream is not None:
                saved |= {f"{name}-{index:05d}": array for index, array in enumerate(stream.saved())}
        if hosts.is_first():
            self._streams = self._submit(_STREAM, saved)

    def keep_end(self, layers: int) -> None:
        """Keep that all blocks are finished: a later stage may be interrupted, and this one need not run again."""
        self._submit(_STREAM, {_LAYER: np.asarray(layers)})

    def _is_busy(self) -> bool:
        return self._streams is not None and not self._streams.done()

    def _submit(self, name: str, arrays: dict[str, Any]) -> Future | None:
        self._raise_errors()
        if self._store is None:
            return None
        self._pending.append(self._writer.submit(self._save, self._store, name, arrays))
        return self._pending[-1]

    def _save(self, store: resume.WorkDir, name: str, arrays: dict[str, Any]) -> None:
        """Write a group, unless an earlier one is missing, without which it could not be gone on from."""
        if self._failed:
            return
        try:
            store.save(name, arrays)
        except BaseException:
            self._failed = True
            raise

    def _raise_errors(self) -> None:
        """Raise the error of what the thread has done, as of a disk that is full."""
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if not future.done()]
        for future in done:
            future.result()
