"""Multiplies one token by a `WordWeight`."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from twla_jax.ops.word_product.weight import BLOCK, LANES, ROWS, WordWeight

_CHAINS = 2  # sums side by side, so that one does not wait for the other
# XLA gives sums of floats to YNNPACK, which takes no integers: these would first be written out as floats. It leaves
# alone what has more than eight dimensions.
_ROW_AXES = (2,) * (ROWS.bit_length() - 1)


def word_product(x: Float[Array, "*one m"], weight: WordWeight) -> Float32[Array, "*one n"]:
    """Return `x Ŵᵀ` of one token, `[..., n]` in float32, reading each word once.

    Fields become floats where they lie, by a mask and without a shift: x is divided by the powers of two instead, which
    is exact. Sums are in float32, and q is not negative, so that rounding is relative to `Σ |x|·(scale·q + |offset|)`.

    Args:
      x: one token, in whatever leading axes.
      weight: of `in_features` m.
    """
    rows, parts, size, vectors, _ = weight.words.shape
    runs, fields = BLOCK // LANES, 32 // weight.bits
    values = jnp.pad(x.reshape(-1).astype(jnp.float32), (0, parts * size * BLOCK - weight.in_features))
    values = values.reshape(parts, size, runs, LANES)
    powers = [2.0 ** -_place(run // vectors, fields, weight.bits) for run in range(runs)]
    masks = np.array(
        [((1 << weight.bits) - 1) << (weight.bits * field) for field in range(fields)], np.uint32
    )
    # Kept apart from the product, whose loop would compute inputs anew for every row. Masks must seem to depend on
    # them: XLA takes out of a loop over tokens what is the same in every turn, and would unpack weights before it.
    inputs, shares, masks = jax.lax.optimization_barrier(
        (values * np.array(powers, np.float32)[:, None], values.sum((-2, -1)) / LANES, masks.view(np.int32))
    )
    lead = (rows // ROWS, *_ROW_AXES, parts, size)
    words = weight.words.reshape(*lead, vectors, LANES)
    scale, offset = (each.reshape(lead) for each in (weight.scale, weight.offset))
    terms = [
        _field(words[..., run % vectors, :] & masks[run // vectors], run // vectors, fields, weight.bits)
        * inputs[:, :, run]
        for run in range(runs)
    ]
    sums = sum(sum(terms[chain::_CHAINS]) for chain in range(_CHAINS))
    y = (sums * scale[..., None] + (offset * shares)[..., None]).sum((-3, -2, -1))
    return y.reshape(-1)[: weight.out_features].reshape(*x.shape[:-1], -1)


def _place(field: int, fields: int, bits: int) -> int:
    """Return by how many bits `_field`'s numbers are too large."""
    return 0 if _is_top(field, fields, bits) else bits * field


def _field(masked: jax.Array, field: int, fields: int, bits: int) -> Float32[Array, "*shape lanes"]:
    """Return a field of words, of which all else is masked, times `2^_place`: only the sign bit's is shifted."""
    top = _is_top(field, fields, bits)
    masked = jax.lax.shift_right_logical(masked, jnp.int32(32 - bits)) if top else masked
    return masked.astype(jnp.float32)


def _is_top(field: int, fields: int, bits: int) -> bool:
    return field == fields - 1 and bits * fields == 32
