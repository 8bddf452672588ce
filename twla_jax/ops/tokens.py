"""Quantised activations as the integer kernels read them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8, Int32

from twla_jax.core import packing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTokens:
    """Activations `x̂ = scale·(codes − zero_point)`, a scale and a zero point a token.

    Codes and zero points are those of `activation.fake_quantize` less `2^(bits − 1)`, so that 8 bits fit int8.
    `sums[..., g]` is the sum of the codes of columns `128g … 128g + 127`; it has four columns for every tile of 512
    that is begun, zero where there are no codes.
    """

    codes: Int8[Array, "*tokens m"]
    scale: Float32[Array, "*tokens"]
    zero_point: Float32[Array, "*tokens"]
    sums: Int32[Array, "*tokens groups"]


def group_sums(x: Array) -> Array:
    """Sums over the groups of 128 columns, four groups a tile: int32 of integers, else float32.

    Args:
      x: `[*tokens, m]`.
    Returns:
      `[*tokens, 4·ceil(m / 512)]`.
    """
    dtype = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    padded = pad_columns(x)
    return padded.reshape(*x.shape[:-1], -1, packing.PLANE).sum(-1, dtype=dtype)


def pad_columns(x: Array) -> Array:
    """x with zeros up to a whole number of tiles of 512 columns."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % packing.TILE)])
