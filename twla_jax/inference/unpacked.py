"""Unpacks quantised weights into floats, for devices without kernels: once, instead of for every token.

A single token reads integers in 32-bit words instead, in fewer bytes than floats: see `ops.word_product`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import IntegerTensor, dequantize
from twla_jax.devices import host_bytes
from twla_jax.inference.packed_block import PackedBlock
from twla_jax.inference.packed_linear import KernelLinear
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.ops.word_product import WordWeight, fits_words, word_bytes, word_weight


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


def add_words(packed: PackedBlock, block: ChainBlock) -> None:
    """Give the linears of a packed block the words of its quantised matrices, where those fit.

    Args:
      packed: of `unpack_block(block)`, on a CPU.
      block: of one layer, as the quantiser left it.
    """
    for site in block.sites:
        linear = getattr(packed, f"{site.name}_linear")
        kernels = tuple(each.kernel.get_value() for each in block.linears(site))
        if isinstance(linear, KernelLinear) and fits_words(kernels):
            linear.words = nnx.data(nnx.Param(_words(kernels)))


def head_words(matrix: jax.Array | IntegerTensor) -> WordWeight | None:
    """Return the words of an LM head of integers, where those fit; else None."""
    if isinstance(matrix, IntegerTensor) and fits_words([matrix]):
        return _words((matrix,))
    return None


def runs_unpacked(model: Decoder) -> bool:
    """Return whether a model runs fastest with its weights as floats: on a CPU with twice the memory that they need."""
    room = host_bytes()
    return jax.default_backend() == "cpu" and room is not None and unpacked_bytes(model) <= room / 2


def unpacked_bytes(model: Decoder) -> int:
    """Return the bytes of a model's matrices as floats of its `dtype`, embedding and LM head included, and as words."""
    linears = [linear for site in model.sites for linear in model.blocks.linears(site)]
    tables = (1 if model.head is None else 2) * model.config.vocab_size * model.config.hidden_size
    weights = sum(
        math.prod(linear.kernel.get_value().shape[:-2]) * math.prod(linear.features) for linear in linears
    )
    words = sum(map(_word_bytes, [linear.kernel.get_value() for linear in linears]))
    words += _word_bytes(model.embed.get_value() if model.head is None else model.head.kernel.get_value())
    return (weights + tables) * model.dtype.itemsize + words


def _word_bytes(kernel: object) -> int:
    experts = isinstance(kernel, PackedTensor) and len(kernel.shape) > 3
    return 0 if experts or not isinstance(kernel, PackedTensor) else word_bytes(kernel)


_words = jax.jit(word_weight)


@functools.partial(jax.jit, static_argnames="dtype")
def _floats(kernel: PackedTensor, *, dtype: jnp.dtype) -> Float[Array, "*experts m n"]:
    return jnp.swapaxes(dequantize(kernel, dtype), -1, -2)
