"""Quantises activations per token: dynamic, asymmetric, with a clip fitted for each input and bit-width."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Int32

BIT_CHOICES = (2, 4, 6, 8)
OFF = 16  # bits of an input that is not quantised


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationQuantizer:
    """Settings of one linear input. `clips[..., i]` belongs to `BIT_CHOICES[i]`; `bits` is one of those, or 16 for off.

    Bits are data, not structure: changing them, for one input or for all, compiles nothing anew. Only `enabled` is
    static; False skips the quantiser, so that 16-bit activations cost nothing.
    """

    __no_type_check__: ClassVar[bool] = True  # a pytree may hold shardings or shapes in place of its arrays

    bits: Int32[Array, "*batch"]
    clips: Float16[Array, "*batch 4"]
    enabled: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Float[Array, "*tokens m"]) -> Float[Array, "*tokens m"]:
        """Return x quantised and dequantised, in its shape and dtype."""
        if not self.enabled:
            return x
        clip = select_clip(self.clips, self.bits)
        return jnp.where(self.bits >= OFF, x, fake_quantize(x, self.bits, clip))


def with_bits(quantizer: ActivationQuantizer, bits) -> ActivationQuantizer:
    """Return the quantiser at other bits: an int, or an array of its batch shape; enabled unless the int 16."""
    enabled = not (isinstance(bits, int) and bits >= OFF)
    return dataclasses.replace(
        quantizer, bits=jnp.broadcast_to(jnp.asarray(bits, jnp.int32), quantizer.bits.shape), enabled=enabled
    )


def select_clip(clips: Float[Array, " 4"], bits: Int32[Array, ""]) -> Float[Array, ""]:
    """Return the clip that belongs to `bits`, a float32 scalar; the widest one's where bits are off."""
    return clips[jnp.clip(bits // 2 - 1, 0, len(BIT_CHOICES) - 1)].astype(jnp.float32)


def fake_quantize(
    x: Float[Array, "*tokens m"], bits, clip, *, rounding: Callable[[jax.Array], jax.Array] = jnp.round
) -> Float[Array, "*tokens m"]:
    """Quantise each token (last axis) to `2**bits` levels and map it back; return the shape and dtype of x.

    Args:
      x: any leading axes are tokens.
      bits: a number, or an array that broadcasts against `x[..., :1]`.
      clip: share of each token's range that the levels span, as `bits`.
      rounding: what `x/s` goes through: `jnp.round`, or something that gradients pass.
    """
    codes, scale, zero_point = quantize_tokens(x, 2.0**bits - 1, clip, rounding=rounding)
    return (scale * (codes - zero_point)).astype(x.dtype)


def quantize_tokens(
    x: Float[Array, "*tokens m"], levels, clip, *, rounding: Callable[[jax.Array], jax.Array] = jnp.round
) -> tuple[Float[Array, "*tokens m"], Float[Array, "*tokens 1"], Float[Array, "*tokens 1"]]:
    """Return codes `[..., m]`, scale and zero point `[..., 1]` of each token, all float32, with `x̂ = s·(q − z)`.

    `s = clip·(max − min)/levels`, `z = round(−clip·min/s)`, `q = clamp(round(x/s) + z, 0, levels)`, `levels = 2^b − 1`
    (TWLA's public quantiser). Zero is always exactly representable where the token's range contains it.

    Args:
      x: any leading axes are tokens.
      levels: `2^b − 1`, a number or an array that broadcasts against `x[..., :1]`.
      clip: share of each token's range that the levels span, as `levels`.
      rounding: what `x/s` goes through.
    """
    values = x.astype(jnp.float32)
    low = clip * values.min(-1, keepdims=True)
    high = clip * values.max(-1, keepdims=True)
    scale = jnp.maximum((high - low) / levels, 1e-8)
    zero_point = jnp.round(-low / scale)
    codes = jnp.clip(rounding(values / scale) + zero_point, 0, levels)
    return codes, scale, zero_point


def fit_clips(
    x: Float[Array, "t m"], output_metric: Float[Array, "m m"], candidates: Sequence[float]
) -> Float16[Array, " 4"]:
    """Return for each of `BIT_CHOICES` the clip with the least output error, float16 `[4]`.

    The error of clip c is `Σ_t e_t (ŴᵀŴ) e_tᵀ` with `e = x̂ − x`: what quantising the input adds to the outputs of
    the *quantised* weights. 1.0 belongs among the candidates, so that no clip is chosen that is worse than none.

    Args:
      x: input tokens, already rotated.
      output_metric: `ŴᵀŴ`, summed over the linears that share this input.
      candidates: clips to try, in (0, 1].
    """
    grid = jnp.asarray(candidates, jnp.float32)

    def error(setting):
        bits, clip = setting
        delta = fake_quantize(x, bits, clip) - x
        return (jnp.matmul(delta, output_metric, precision=jax.lax.Precision.HIGHEST) * delta).sum()

    bits = jnp.repeat(jnp.asarray(BIT_CHOICES, jnp.float32), grid.size)
    errors = jax.lax.map(error, (bits, jnp.tile(grid, len(BIT_CHOICES))))
    return grid[errors.reshape(len(BIT_CHOICES), -1).argmin(-1)].astype(jnp.float16)
