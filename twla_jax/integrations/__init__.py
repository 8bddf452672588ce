"""Quantises Flax models that know nothing of this library, through qwix (the extra `qwix`)."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from twla_jax.errors import TwlaError

if TYPE_CHECKING:
    from twla_jax.integrations.linen_models import quantize_linen, quantized_linen_shapes
    from twla_jax.integrations.nnx_models import quantize_nnx, quantized_nnx_shapes
    from twla_jax.integrations.packed_kernel import PackedKernel
    from twla_jax.integrations.providers import MomentProvider, TwlaProvider, TwlaRule

_HOMES = {
    "MomentProvider": "providers",
    "PackedKernel": "packed_kernel",
    "TwlaProvider": "providers",
    "TwlaRule": "providers",
    "quantize_linen": "linen_models",
    "quantize_nnx": "nnx_models",
    "quantized_linen_shapes": "linen_models",
    "quantized_nnx_shapes": "nnx_models",
}

__all__ = [
    "MomentProvider",
    "PackedKernel",
    "TwlaProvider",
    "TwlaRule",
    "quantize_linen",
    "quantize_nnx",
    "quantized_linen_shapes",
    "quantized_nnx_shapes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'twla_jax.integrations' has no attribute '{name}'")
    try:
        importlib.import_module("qwix")
    except ImportError:
        raise TwlaError(f"{name} needs the package qwix: pip install 'twla-jax[qwix]'") from None
    return getattr(importlib.import_module(f"twla_jax.integrations.{_HOMES[name]}"), name)
