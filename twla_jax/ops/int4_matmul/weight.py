"""Four-bit weights in the layout the kernels read."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from twla_jax.ops.ternary_matmul.weight import ROWS, KernelWeight
from twla_jax.packing import PLANE

_LEVELS = 15
_OFFSET = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4Weight(KernelWeight):
    """A matrix `Ŵ = α·(U − 8) + μ`, U of four bits, with an (α, μ) for every 128 columns of a row.

    Invariants: those of `KernelWeight`, but for tiles of 256 columns: byte c of a tile holds column c in its low half
    and column c + 128 in its high one, and `scales` is `[tiles, 4, rows]`. Columns that are not there have U = 0 and
    meet activations of zero; rows that are not there have α = μ = 0.
    """

    @property
    def planes(self) -> int:
        """Codes in a byte, each of another run of 128 columns."""
        return 2

    @property
    def offset(self) -> int:
        """What a stored code is above the one that α multiplies."""
        return _OFFSET


def int4_weight(
    weights: Sequence[Float[Array, "n m"]], biases: Sequence[Array | None] | None = None
) -> Int4Weight:
    """Rounds matrices that read the same input to four bits, and stacks them.

    Each group of 128 columns of a row spans its least to its largest value in 15 equal steps, rounded to nearest, with
    the step and the middle kept in float16: no weight moves by more than half a step and what float16 rounds off.

    Args:
      weights: of the same columns.
      biases: of their outputs; None for no bias.
    """
    m = weights[0].shape[1]
    splits = tuple(len(weight) for weight in weights)
    bias = [
        jnp.zeros(n) if b is None else jnp.asarray(b, jnp.float32)
        for n, b in zip(splits, biases or [None] * len(splits), strict=True)
    ]
    padding = -sum(splits) % ROWS
    matrix = jnp.concatenate([jnp.asarray(weight, jnp.float32) for weight in weights])
    groups = -(-m // PLANE)
    # The last group is filled up with its own last column, which neither widens nor shifts its range.
    matrix = jnp.pad(matrix, ((0, 0), (0, groups * PLANE - m)), mode="edge").reshape(-1, groups, PLANE)
    low, high = matrix.min(-1), matrix.max(-1)
    alpha = ((high - low) / _LEVELS).astype(jnp.float16)
    # The middle code is 8, half a step above the middle of the range.
    mu = ((low + high) / 2 + alpha.astype(jnp.float32) / 2).astype(jnp.float16)
    wide_alpha, wide_mu = (p.astype(jnp.float32)[..., None] for p in (alpha, mu))
    step = jnp.where(wide_alpha > 0, wide_alpha, 1.0)
    unsigned = jnp.clip(jnp.round((matrix - wide_mu) / step) + _OFFSET, 0, _LEVELS)
    real = (jnp.arange(groups * PLANE) < m).reshape(groups, PLANE)
    dequantized = jnp.where(real, wide_alpha * (unsigned - _OFFSET) + wide_mu, 0)
    unsigned = jnp.where(real, unsigned, 0).astype(jnp.uint8)
    odd = groups % 2
    unsigned = jnp.pad(unsigned, ((0, padding), (0, odd), (0, 0))).reshape(
        len(unsigned) + padding, -1, 2, PLANE
    )
    alpha, mu = (
        jnp.pad(p, ((0, padding), (0, odd))).T.reshape(unsigned.shape[1], 2, -1) for p in (alpha, mu)
    )
    return Int4Weight(
        codes=(unsigned[:, :, 0] | unsigned[:, :, 1] << 4).reshape(len(unsigned), -1),
        scales=jnp.concatenate([alpha, mu], axis=1),
        row_sums=jnp.pad(dequantized.sum((1, 2)), (0, padding)),
        bias=jnp.pad(jnp.concatenate(bias), (0, padding)),
        in_features=m,
        splits=splits,
    )


def int4_rows(weight: Int4Weight, rows: Int[Array, "*shape"], dtype=jnp.bfloat16) -> Float[Array, "*shape m"]:
    """The rows asked for of `Ŵ`, as an embedding looks them up; computed in float32."""
    packed = weight.codes[rows].reshape(*rows.shape, weight.tiles, 1, PLANE)
    unsigned = jnp.concatenate([packed & 15, packed >> 4], axis=-2).astype(jnp.float32)
    scales = jnp.moveaxis(weight.scales[:, :, rows], (0, 1), (-2, -1)).astype(jnp.float32)
    values = scales[..., :2, None] * (unsigned - _OFFSET) + scales[..., 2:, None]
    return values.reshape(*rows.shape, -1)[..., : weight.in_features].astype(dtype)
