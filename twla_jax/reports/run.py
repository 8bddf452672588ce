"""Records what a report holds beside the results: phases with their times, versions, the device, peak memory."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from twla_jax.progress import say
from twla_jax.version import __version__

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "gguf",
    "numpy",
)
_ONE_ORDER = "--xla_gpu_deterministic_ops=true"


class Phases:
    """Seconds spent in each named phase of a run; each is announced on stderr when it begins.

    Attributes:
      seconds: wall-clock seconds by phase, in the order they ran; a phase entered twice adds up.
      peak_memory: `peak_memory()` at the end of each: the phase that raised it is the one that took so much.
    """

    def __init__(self, verbose: bool = True):
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, dict[str, int | None]] = {}
        self._verbose = verbose

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what runs inside `with phases(name):`."""
        if self._verbose:
            say(f"{name} …")
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.peak_memory[name] = peak_memory()


def environment() -> dict[str, Any]:
    """Return the versions, the device that computes, and when a run gives the same bytes again, JSON-ready."""
    device = jax.devices()[0]
    return {
        "versions": {
            "twla-jax": __version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "same_bytes": same_bytes(device.platform, jax.device_count(), os.environ.get("XLA_FLAGS", "")),
    }


def same_bytes(kind: str, devices: int, flags: str) -> str:
    """Return in words when the same command gives the same bytes; `docs/reliability.md` says what was tried.

    Args:
      kind: platform of the devices, as JAX calls it.
      devices: how many there are.
      flags: of XLA.
    """
    shared = "same versions, XLA flags and kind of device"
    if devices > 1:
        shared += f", on the same mesh of these {devices}: others add up in another order"
    if kind == "gpu" and _ONE_ORDER not in flags:
        return f"not promised, as a GPU may add up in another order each time; with XLA_FLAGS={_ONE_ORDER}: {shared}"
    return shared


def peak_memory() -> dict[str, int | None]:
    """Return the most bytes held so far: by this process on the host, and on its first device if its driver says so."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statistics = jax.local_devices()[0].memory_stats() or {}
    return {
        "host_bytes": peak if sys.platform == "darwin" else peak * 1024,  # Linux counts in KiB
        "device_bytes": statistics.get("peak_bytes_in_use"),
    }
