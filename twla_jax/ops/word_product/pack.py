"""Packs the integers of weight matrices into the words of a `WordWeight`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Integer

from twla_jax.core import packing
from twla_jax.core.tensors import RATIO_STEPS, IntegerTensor, TernaryTensor, per_column
from twla_jax.ops.word_product.weight import (
    BLOCK,
    LANES,
    ROWS,
    WordWeight,
    blocks_of,
    field_bits,
    vectors_of,
)


def word_weight(kernels: Sequence[TernaryTensor | IntegerTensor]) -> WordWeight:
    """Return matrices that read one input, one below the other, as words; only what `fits_words`."""
    bits, in_features = field_bits(kernels[0]), kernels[0].in_features
    codes, scale, offset = (jnp.concatenate(each) for each in zip(*map(_integers, kernels), strict=True))
    parts, size = blocks_of(in_features)
    rows = len(codes)
    short = -rows % ROWS
    padded = jnp.pad(codes, ((0, short), (0, parts * size * BLOCK - in_features)))
    fields, vectors = 32 // bits, vectors_of(bits)
    runs = padded.reshape(-1, parts, size, BLOCK // LANES, LANES)
    runs = jnp.pad(runs, [(0, 0)] * 3 + [(0, fields * vectors - BLOCK // LANES), (0, 0)])
    places = runs.reshape(*runs.shape[:3], fields, vectors, LANES).astype(jnp.uint32)
    shifts = (bits * jnp.arange(fields, dtype=jnp.uint32))[:, None, None]
    words = (places << shifts).sum(3, dtype=jnp.uint32)

    def ofblocks_of(parameter, group_size):
        blocks = jnp.arange(-(-in_features // BLOCK)) * BLOCK // group_size
        parameter = parameter.astype(jnp.float32)[:, blocks]
        parameter = jnp.pad(parameter, ((0, short), (0, parts * size - parameter.shape[1])))
        return parameter.reshape(-1, parts, size)

    return WordWeight(
        words=jax.lax.bitcast_convert_type(words, jnp.int32),
        scale=ofblocks_of(scale, kernels[0].group_size),
        offset=ofblocks_of(offset, kernels[0].group_size),
        out_features=rows,
        in_features=in_features,
        bits=bits,
    )


def _integers(
    kernel: TernaryTensor | IntegerTensor,
) -> tuple[Integer[Array, "n m"], Float32[Array, "n groups"], Float32[Array, "n groups"]]:
    """Return q, scale and offset of a matrix; of two planes, whose α are in whole steps, `q = 200·U₁ + ratio·U₂`."""
    if isinstance(kernel, IntegerTensor):
        scale = kernel.scale.astype(jnp.float32)
        return kernel.codes.astype(jnp.int32), scale, -scale * kernel.zero_point.astype(jnp.float32)
    first = packing.unpack(kernel.codes, kernel.in_features).astype(jnp.int32)
    alpha, mu = (jnp.asarray(each, jnp.float32) for each in (kernel.alpha, kernel.mu))
    if kernel.residual_codes is None or kernel.residual_ratio is None:
        return first, alpha, mu - alpha
    second = packing.unpack(kernel.residual_codes, kernel.in_features).astype(jnp.int32)
    ratio = kernel.residual_ratio.astype(jnp.float32)
    ratios = per_column(ratio, kernel.in_features, kernel.group_size).astype(jnp.int32)
    codes = RATIO_STEPS * first + ratios * second
    return codes, alpha / RATIO_STEPS, mu - alpha * (1 + ratio / RATIO_STEPS)
