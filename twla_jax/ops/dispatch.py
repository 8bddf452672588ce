"""Decides which implementation of an op runs: the platform's kernel where it can, else the XLA reference."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from twla_jax.devices import gpu_obstacle
from twla_jax.errors import TwlaError

Implementation = Literal["xla", "gpu", "tpu"]

_log = logging.getLogger(__name__)
_PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}


def dispatch(
    op: str,
    implementation: Implementation | None,
    xla: Callable[..., Any],
    kernels: Mapping[str, Callable[..., Any]],
    obstacles: Mapping[str, str | None],
    *operands: Any,
) -> Any:
    """Run the requested implementation, or that of the platform the program is compiled for, and return its result.

    Args:
      op: the op's name, for messages.
      implementation: None lets the platform decide, once it is known: every branch is traced, one is compiled.
      xla: the reference; runs everywhere.
      kernels: `gpu` and `tpu`, called with the same operands as the reference.
      obstacles: why a kernel cannot take these operands; None, or no entry, where it can. A GPU that the kernels are
        not written for is an obstacle, too.
      *operands: of the op.

    Raises:
      TwlaError: the requested implementation cannot take these operands, or does not exist.
    """
    if implementation == "xla":
        return xla(*operands)
    obstacles = {**obstacles, "gpu": obstacles.get("gpu") or gpu_obstacle()}
    if implementation is not None:
        if implementation not in kernels:
            raise TwlaError(
                f"{op}: implementation {implementation!r} must be one of xla, {', '.join(kernels)}"
            )
        if reason := obstacles.get(implementation):
            raise TwlaError(f"{op}: implementation {implementation!r} cannot be used: {reason}")
        return kernels[implementation](*operands)
    branches = {}
    for name, kernel in kernels.items():
        if reason := obstacles.get(name):
            _log_fallback(op, name, reason)
        else:
            branches[_PLATFORMS[name]] = kernel
    return jax.lax.platform_dependent(*operands, default=xla, **branches)


@functools.cache
def _log_fallback(op: str, name: str, reason: str) -> None:
    _log.info("%s: the XLA reference replaces the %s kernel: %s", op, name, reason)
