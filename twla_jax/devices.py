"""What the default device can do."""

import functools
import logging
import sys

import jax

from twla_jax import xla_flags

_log = logging.getLogger(__name__)


def compute_capability() -> tuple[int, int] | None:
    """Of the default device, if it is an NVIDIA GPU: (8, 0) for an A100, (9, 0) for an H100."""
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor or 0)) if major.isdecimal() else None


def multiprocessors() -> int:
    """Of the default device, if it is a GPU; else as many as may be."""
    found = getattr(jax.devices()[0], "core_count", None) if jax.default_backend() == "gpu" else None
    return sys.maxsize if found is None else found


def gpu_obstacle() -> str | None:
    """Why the default GPU cannot run kernels made for Hopper, or None; also None where there is no GPU."""
    if jax.default_backend() != "gpu" or ((found := compute_capability()) is not None and found[0] == 9):
        return None
    return f"{jax.devices()[0].device_kind} is no Hopper GPU"


@functools.cache
def warn_of_products() -> None:
    """Logs, once, that XLA may take a GPU's matrix products from its own compiler: see `xla_flags`."""
    if jax.default_backend() == "gpu" and not xla_flags.says_where_products_are_from():
        _log.warning(
            "set XLA_FLAGS=--xla_gpu_enable_triton_gemm=false before JAX starts: XLA's own matrix products take long "
            "to be chosen, and have been wrong on an H100"
        )
