"""Quantises a matrix by the published layout (public TWLA code, arXiv 2606.13054): see `grouped_tensor`."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from twla_jax.core import factors, gptq, masked_fit, packing, saliency
from twla_jax.core.grouped_tensor import BLOCK, GroupedTensor, salient_room

_HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnames="damping")
def quantize_in_groups(
    weight: Float[Array, "n m"],
    moment: Float[Array, "m m"],
    tokens: Num[Array, ""] | float,
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
    padded = -(-m // BLOCK) * BLOCK
    weight = jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, padded - m)))
    mean_moment = jnp.pad(moment / tokens, (0, padded - m))
    exists = jnp.arange(padded) < m
    root, inverse, used = factors.factor(mean_moment, exists, damping)

    def fit_groups(fit, block, groups, metric):
        """Return scales, codes and values of two groups that have as many planes, each with the groups in front."""

        def fitted(group):
            scales, codes = fit(block, group)
            scales = masked_fit.relocate(block, group, scales, codes, metric)
            scales = tuple(p.astype(jnp.float16).astype(jnp.float32) for p in scales)
            return scales, codes, masked_fit.values(scales, codes, group)

        return jax.vmap(fitted)(groups)

    def quantize_block(w, start):
        columns = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=BLOCK)
        block, mask = columns(w, axis=1), columns(exists)
        rows, metric = columns(inverse), columns(columns(mean_moment), axis=1)
        masks = saliency.group_masks(block, jnp.diagonal(columns(rows, axis=1)), metric, mask)
        two, two_codes, salient_fit = fit_groups(masked_fit.euclidean_two_planes, block, masks[:2], metric)
        one, one_codes, other_fit = fit_groups(masked_fit.euclidean_one_plane, block, masks[2:], metric)
        scales = [part[group] for found in (two, one) for group in range(2) for part in found]
        first, second = two_codes[0].sum(0) + one_codes[0].sum(0), two_codes[1].sum(0)
        fitted = salient_fit.sum(0) + other_fit.sum(0)
        error = jnp.where(mask, block - fitted, 0)
        root_block = columns(columns(root), axis=1)
        pushed = jnp.matmul(jnp.matmul(error, root_block, precision=_HIGHEST), rows, precision=_HIGHEST)
        w = w - jnp.where(jnp.arange(padded) >= start + BLOCK, pushed, 0)
        stored = first.astype(jnp.int8), second.astype(jnp.int8), masks[0] | masks[2], masks[:2].any((0, 1))
        return w, (stored, jnp.stack(scales, axis=-1))

    _, (stored, scales) = jax.lax.scan(quantize_block, weight, jnp.arange(0, padded, BLOCK))
    first, second, large = (part.swapaxes(0, 1).reshape(n, padded)[:, :m] for part in stored[:3])
    salient = stored[3].reshape(padded)[:m]
    width = salient_room(m)
    kept = jnp.argsort(~salient, stable=True)[:width]
    tensor = GroupedTensor(
        codes=packing.pack(first),
        residual_codes=packing.pack(second[:, kept]),
        large=packing.pack_bits(large.astype(jnp.uint8), 1),
        salient=packing.pack_bits(salient.astype(jnp.uint8)[None], 1)[0],
        scales=scales.swapaxes(0, 1).astype(jnp.float16),
        in_features=m,
        group_size=BLOCK,
        salient_width=width,
    )
    difference = weight[:, :m] - tensor.dequantize()
    return tensor, gptq.output_figures(weight[:, :m], difference, moment / tokens) | {"damping": used}
