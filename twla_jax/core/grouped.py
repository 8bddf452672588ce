"""The published layout as a whole: four groups in every 128 columns, ten scales a row and block.

Salient columns have two planes and one mean, other columns one plane and one mean, each split by magnitude (public
TWLA code, arXiv 2606.13054). What is stored is what the layout needs: codes of one plane everywhere and of a second
in salient columns, a bit an element for the magnitude group, a bit a column, ten float16 numbers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, UInt8

from twla_jax.core import gptq, masked_fit, packing, saliency
from twla_jax.core.tensors import per_column

SCALES = 10  # μ, α₀, α₁ of salient large and of salient small; μ, α of other large and of other small
_MU, _ALPHA, _BETA = (0, 3, 6, 8), (1, 4, 7, 9), (2, 5)
_BLOCK = 128
_HIGHEST = jax.lax.Precision.HIGHEST


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


@functools.partial(jax.jit, static_argnames="damping")
def quantize_in_groups(
    weight: Float[Array, "n m"],
    moment: Float[Array, "m m"],
    tokens: Float[Array, ""],
    *,
    damping: float = 0.1,
) -> tuple[GroupedTensor, dict[str, Float[Array, ""]]]:
    """Quantise one matrix by the published layout, 128 columns at a time, in one scan.

    A block's groups, codes and scales are fixed by the weights as compensated so far; then its error goes to the
    columns that follow. As published, codes are not rounded again; so the column-by-column sweep is one triangular
    product. The scales are rounded to float16 first, so what is stored is what is compensated.

    Args:
      weight: rows are outputs, already rotated.
      moment: `S = Σ xᵀx` over calibration inputs, rotated the same way; summed once, never rescaled in mid-stream.
      tokens: how many tokens S sums over.
      damping: share of the mean diagonal that is added to `S/t` (the public code's 0.1).

    Returns:
      The tensor, with room for 63 salient columns a block, and the figures of `gptq.quantize_matrix`.
    """
    n, m = weight.shape
    padded = -(-m // _BLOCK) * _BLOCK
    weight = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, padded - m)))
    mean_moment = jnp.pad(moment / tokens, (0, padded - m))
    exists = jnp.arange(padded) < m
    root, inverse, used = gptq.factor(mean_moment, exists, damping)

    def quantize_block(w, start):
        columns = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=_BLOCK)
        block, mask = columns(w, axis=1), columns(exists)
        rows, metric = columns(inverse), columns(columns(mean_moment), axis=1)
        masks = saliency.group_masks(block, jnp.diagonal(columns(rows, axis=1)), metric, mask)
        zero = jnp.zeros_like(block)
        scales, first, second, fitted = [], zero, zero, zero
        for index, group in enumerate(masks):
            fit = masked_fit.euclidean_two_planes if index < 2 else masked_fit.euclidean_one_plane
            found, codes = fit(block, group)
            found = masked_fit.relocate(block, group, found, codes, metric)
            found = tuple(p.astype(jnp.float16).astype(jnp.float32) for p in found)
            fitted += masked_fit.values(found, codes, group)
            first, second = first + codes[0], second + (codes[1] if index < 2 else 0.0)
            scales.extend(found)
        error = jnp.where(mask, block - fitted, 0)
        root_block = columns(columns(root), axis=1)
        pushed = jnp.matmul(jnp.matmul(error, root_block, precision=_HIGHEST), rows, precision=_HIGHEST)
        w = w - jnp.where(jnp.arange(padded) >= start + _BLOCK, pushed, 0)
        stored = first.astype(jnp.int8), second.astype(jnp.int8), masks[0] | masks[2], masks[:2].any((0, 1))
        return w, (stored, jnp.stack(scales, axis=-1))

    _, (stored, scales) = jax.lax.scan(quantize_block, weight, jnp.arange(0, padded, _BLOCK))
    first, second, large = (part.swapaxes(0, 1).reshape(n, padded)[:, :m] for part in stored[:3])
    salient = stored[3].reshape(padded)[:m]
    width = min(m, saliency.MAX_SALIENT * (padded // _BLOCK))
    kept = jnp.argsort(~salient, stable=True)[:width]
    tensor = GroupedTensor(
        codes=packing.pack(first),
        residual_codes=packing.pack(second[:, kept]),
        large=packing.pack_bits(large.astype(jnp.uint8), 1),
        salient=packing.pack_bits(salient.astype(jnp.uint8)[None], 1)[0],
        scales=scales.swapaxes(0, 1).astype(jnp.float16),
        in_features=m,
        group_size=_BLOCK,
        salient_width=width,
    )
    difference = weight[:, :m] - tensor.dequantize()
    return tensor, gptq.output_figures(weight[:, :m], difference, moment / tokens) | {"damping": used}
