"""Holds a weight matrix in the published layout: four groups in every 128 columns, ten scales a row and block.

Salient columns have two planes and one mean, other columns one plane and one mean, each split by magnitude (public
TWLA code, arXiv 2606.13054). What is stored is what the layout needs: codes of one plane everywhere and of a second
in salient columns, a bit an element for the magnitude group, a bit a column, ten float16 numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, UInt8

from twla_jax.core import packing
from twla_jax.core.tensors import per_column

# Where each scale is: μ, α₀, α₁ of salient large and of salient small; μ, α of other large and of other small
_MU, _ALPHA, _BETA = (0, 3, 6, 8), (1, 4, 7, 9), (2, 5)
BLOCK = 128  # columns of a block
MAX_SALIENT = 63  # salient columns of a block, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedTensor:
    """A weight matrix in the published layout, rows are outputs.

    Invariants: `codes` packs the first plane of all columns as `packing.pack` does, `residual_codes` the second plane
    of the salient columns alone, in order and filled up to `salient_width`; `large` and `salient` are bits, lowest
    first (`packing.pack_bits`). Leading axes are shared by all arrays; `salient` has no axis of rows.
    """

    codes: UInt8[Array, "*batch n bytes"]
    residual_codes: UInt8[Array, "*batch n rbytes"]
    large: UInt8[Array, "*batch n bits"]
    salient: UInt8[Array, "*batch bits"]
    scales: Float16[Array, "*batch n blocks 10"]
    in_features: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    salient_width: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Return `[..., n, m]`, the shape of the matrix it stands for."""
        return (*self.codes.shape[:-1], self.in_features)

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "*batch n m"]:
        """Return the matrix `Ŵ` in `dtype`; unpacks it whole."""
        m = self.in_features
        salient = packing.unpack_bits(self.salient, 1, m).astype(bool)[..., None, :]
        large = packing.unpack_bits(self.large, 1, m).astype(bool)
        first = packing.unpack(self.codes, m).astype(dtype) - 1
        place = jnp.clip(jnp.cumsum(salient, -1) - 1, 0, self.salient_width - 1)
        second = packing.unpack(self.residual_codes, self.salient_width).astype(dtype) - 1
        second = jnp.take_along_axis(second, jnp.broadcast_to(place, first.shape), axis=-1)

        def column(index):
            return per_column(self.scales[..., index].astype(dtype), m, self.group_size)

        def chosen(indices):
            inside, outside = (
                jnp.where(large, column(indices[i]), column(indices[i + 1])) for i in (0, len(indices) - 2)
            )
            return inside, outside

        (mu_in, mu_out), (alpha_in, alpha_out) = chosen(_MU), chosen(_ALPHA)
        beta = chosen(_BETA)[0]
        return jnp.where(salient, mu_in + alpha_in * first + beta * second, mu_out + alpha_out * first)

    def trimmed(self, width: int) -> "GroupedTensor":
        """Return the same matrix with room for `width` salient columns, no fewer than there are."""
        codes = packing.unpack(self.residual_codes, self.salient_width)[..., :width].astype(jnp.int8) - 1
        return dataclasses.replace(self, residual_codes=packing.pack(codes), salient_width=width)

    def salient_count(self) -> int:
        """Return the most salient columns that a matrix of the stack has."""
        return int(packing.unpack_bits(self.salient, 1, self.in_features).sum(-1).max())


def salient_room(in_features: int) -> int:
    """Return how many salient columns a matrix may have."""
    return min(in_features, MAX_SALIENT * -(-in_features // BLOCK))
