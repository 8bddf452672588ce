"""Describes the default device: its kind, its size, and whether the kernels run on it."""

import contextlib
import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from twla_jax import xla_flags

_log = logging.getLogger(__name__)
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def compute_capability() -> tuple[int, int] | None:
    """Return the default device's compute capability, (9, 0) for an H100; None if it is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor or 0)) if major.isdecimal() else None


def multiprocessors() -> int:
    """Return how many multiprocessors the default GPU has; `sys.maxsize` on other devices."""
    found = getattr(jax.devices()[0], "core_count", None) if jax.default_backend() == "gpu" else None
    return sys.maxsize if found is None else found


def on_device(tree: Any) -> Any:
    """Return a pytree with its arrays on the default device; those of devices stay where they are.

    For every shape `jnp.asarray` compiles a program that copies the array once more: room for two is needed (JAX 0.11).

    Args:
      tree: its leaves may be on the host, in files or on devices.
    """
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jax.device_put(np.asarray(leaf)), tree
    )


def host_bytes() -> int | None:
    """Return the memory of this machine, or of the container that this process runs in; None where none says."""
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        found.append(int(_CONTAINER_LIMIT.read_text()))
    return min(found, default=None)


def gpu_obstacle() -> str | None:
    """Return why the default GPU cannot run the Hopper kernels; None if it can, or if there is no GPU."""
    if jax.default_backend() != "gpu" or ((found := compute_capability()) is not None and found[0] == 9):
        return None
    return f"{jax.devices()[0].device_kind} is no Hopper GPU"


@functools.cache
def warn_if_triton_gemm() -> None:
    """Log once that XLA may use its own Triton matrix products on this GPU; see `xla_flags`."""
    if jax.default_backend() == "gpu" and not xla_flags.triton_gemm_is_set():
        _log.warning(
            "set XLA_FLAGS=--xla_gpu_enable_triton_gemm=false before JAX starts: XLA spends minutes choosing among its "
            "own matrix products, and some were wrong on an H100"
        )
