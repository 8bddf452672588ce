"""Defines quantised activations as the integer kernels read them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Int32

from twla_jax.core import activation, packing

FINER = 254.0  # steps of a wide code's second part in one of the first


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTokens:
    """Holds activations `x̂ = scale·(codes − zero_point)`, with a scale and a zero point a token.

    Codes and zero points are those of `activation.fake_quantize` less `2^(bits − 1)`, so that 8 bits fit int8.
    `sums[..., g]` is the sum of the codes of columns `128g … 128g + 127`; it has four columns for every tile of 512
    that is begun, zero where there are no codes. If `wide`, all arrays have a leading axis of 2, and x̂ is the sum of
    both: see `wide_tokens`.
    """

    codes: Int8[Array, "*tokens m"]
    scale: Float32[Array, "*tokens"]
    zero_point: Float32[Array, "*tokens"]
    sums: Int32[Array, "*tokens groups"]
    wide: bool = dataclasses.field(default=False, metadata={"static": True})

    def dequantize(self) -> Float32[Array, "*tokens m"]:
        """Return x̂ `[*tokens, m]`; for wide tokens, the sum of both."""
        values = self.scale[..., None] * (self.codes - self.zero_point[..., None])
        return values.sum(0) if self.wide else values


def quantizer_settings(bits: Int32[Array, ""] | int, clip: Float[Array, ""] | float) -> Float32[Array, " 3"]:
    """Return the quantiser's settings `[3]` as data: levels less one, clip, and the offset that makes codes signed.

    Args:
      bits: 2 to 8.
      clip: share of the token's range that the codes span.
    """
    bits = jnp.asarray(bits, jnp.float32)
    return jnp.stack([2.0**bits - 1, jnp.asarray(clip, jnp.float32), 2.0 ** (bits - 1)])


def wide_tokens(x: Float[Array, "*tokens m"]) -> QuantizedTokens:
    """Return 16-bit codes of tokens as two int8 codes, stacked along a new leading axis of 2.

    The first part is the asymmetric 8-bit quantiser over the token's whole range, `s = (max − min)/255`; the second
    rounds what is left in steps of `s/254`. So `|x − x̂| ≤ s/508`, that is `(max − min)/129540`, up to float32: 16 bits
    of the token's range, where bf16 keeps 8 bits of each number. Ternary weights are read once for both parts.
    """
    values = x.astype(jnp.float32)
    codes, scale, zero_point = activation.quantize_tokens(values, jnp.float32(255), jnp.float32(1))
    rest = values - scale * (codes - zero_point)
    fine = jnp.clip(jnp.round(rest * (FINER / scale)), -FINER / 2, FINER / 2)
    signed = jnp.stack([codes - 128, fine]).astype(jnp.int8)
    return QuantizedTokens(
        codes=signed,
        scale=jnp.stack([scale, scale / FINER])[..., 0],
        zero_point=jnp.stack([zero_point - 128, jnp.zeros_like(zero_point)])[..., 0],
        sums=group_sums(signed),
        wide=True,
    )


def group_sums(x: Array) -> Array:
    """Return the sums over groups of 128 columns, four groups a tile: int32 for integers, else float32.

    Args:
      x: `[*tokens, m]`.

    Returns:
      `[*tokens, 4·ceil(m / 512)]`.
    """
    dtype = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    padded = pad_columns(x)
    return padded.reshape(*x.shape[:-1], -1, packing.PLANE).sum(-1, dtype=dtype)


def pad_columns(x: Array) -> Array:
    """Return x with zeros up to a whole number of tiles of 512 columns."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % packing.TILE)])
