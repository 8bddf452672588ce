"""Unpacks quantised weights into floats, for devices without kernels: once, instead of for every token."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import dequantize
from twla_jax.devices import host_bytes
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace


def unpack_block(block: ChainBlock, dtype: DTypeLike) -> ChainBlock:
    """Return a block with its packed matrices as arrays `[..., in, out]` of `dtype`, the very numbers they stand for.

    Rotations and activation quantisers stay: sums aside, which may run in another order, it computes the same.
    """
    kernels = {
        f"{name}.kernel": getattr(block, name).kernel.get_value()
        for site in block.sites
        for name in site.linears
    }
    packed = {path: kernel for path, kernel in kernels.items() if isinstance(kernel, PackedTensor)}
    return replace(block, {path: _floats(kernel, dtype=jnp.dtype(dtype)) for path, kernel in packed.items()})


def runs_unpacked(model: Decoder) -> bool:
    """Return whether a model runs fastest with its weights as floats: on a CPU with twice the memory that they need."""
    room = host_bytes()
    return jax.default_backend() == "cpu" and room is not None and unpacked_bytes(model) <= room / 2


def unpacked_bytes(model: Decoder) -> int:
    """Return the bytes of all matrices of a model as floats of its `dtype`, embedding and LM head included."""
    linears = (linear for site in model.sites for linear in model.blocks.linears(site))
    tables = (1 if model.head is None else 2) * model.config.vocab_size * model.config.hidden_size
    weights = sum(
        math.prod(linear.kernel.get_value().shape[:-2]) * math.prod(linear.features) for linear in linears
    )
    return (weights + tables) * model.dtype.itemsize


@functools.partial(jax.jit, static_argnames="dtype")
def _floats(kernel: PackedTensor, *, dtype: jnp.dtype) -> Float[Array, "*experts m n"]:
    return jnp.swapaxes(dequantize(kernel, dtype), -1, -2)
