"""Packs the integers of weight matrices into 32-bit words for `word_product`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Integer

from twla_jax.core import packing
from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import RATIO_STEPS, IntegerTensor, TernaryTensor, per_column

BLOCK = 128  # columns that share a scale here
LANES = 8  # words that are unpacked at once: a register of AVX2
ROWS = 64  # rows are filled up to a whole number of these, see `word_product`
_LONGEST = 32  # longer sums than this XLA would first write out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WordWeight:
    """Holds a matrix `Ŵ[i, c] = scale[i, c // 128]·q[i, c] + offset[i, c // 128]`, several q of `bits` bits a word.

    A block of 128 columns is 16 runs of 8. Run `k·V + v`, with V the `vectors` of a block, is field k, counted from the
    lowest bits, of words `[v, 0 … 7]`. Rows are filled up to a multiple of 64 and blocks to `parts · size`, with zeros.
    """

    __no_type_check__: ClassVar[bool] = True  # a pytree may hold shardings or shapes in place of its arrays

    words: Int32[Array, "rows parts size vectors lanes"]
    scale: Float32[Array, "rows parts size"]
    offset: Float32[Array, "rows parts size"]
    out_features: int = dataclasses.field(metadata={"static": True})
    in_features: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})


def fits_words(kernels: Sequence[object]) -> bool:
    """Return whether matrices that read one input can be one `WordWeight`: ternary or integer, by groups of 128·k."""
    widths = {_field_bits(kernel) for kernel in kernels if _fits(kernel)}
    return len(widths) == 1 and all(_fits(kernel) for kernel in kernels)


def _field_bits(kernel: TernaryTensor | IntegerTensor) -> int:
    """Return the bits of a field: 2 for one plane, 10 for two, 2, 4 or 8 for integers."""
    if isinstance(kernel, TernaryTensor):
        return 2 if kernel.residual_codes is None else 10
    return next(bits for bits in (2, 4, 8) if bits >= kernel.bits)


def word_bytes(kernel: PackedTensor) -> int:
    """Return the bytes that a stack of matrices takes as words, scales included; 0 if those do not fit."""
    if not _fits(kernel):
        return 0
    parts, size = _blocks(kernel.in_features)
    rows = -(-kernel.shape[-2] // ROWS) * ROWS
    numbers = _vectors(_field_bits(kernel)) * LANES + 2
    return math.prod(kernel.shape[:-2]) * rows * parts * size * numbers * 4


def word_weight(kernels: Sequence[TernaryTensor | IntegerTensor]) -> WordWeight:
    """Return matrices that read one input, one below the other, as words; only what `fits_words`."""
    bits, in_features = _field_bits(kernels[0]), kernels[0].in_features
    codes, scale, offset = (jnp.concatenate(each) for each in zip(*map(_integers, kernels), strict=True))
    parts, size = _blocks(in_features)
    rows = len(codes)
    short = -rows % ROWS
    padded = jnp.pad(codes, ((0, short), (0, parts * size * BLOCK - in_features)))
    fields, vectors = 32 // bits, _vectors(bits)
    runs = padded.reshape(-1, parts, size, BLOCK // LANES, LANES)
    runs = jnp.pad(runs, [(0, 0)] * 3 + [(0, fields * vectors - BLOCK // LANES), (0, 0)])
    places = runs.reshape(*runs.shape[:3], fields, vectors, LANES).astype(jnp.uint32)
    shifts = (bits * jnp.arange(fields, dtype=jnp.uint32))[:, None, None]
    words = (places << shifts).sum(3, dtype=jnp.uint32)

    def of_blocks(parameter, group_size):
        blocks = jnp.arange(-(-in_features // BLOCK)) * BLOCK // group_size
        parameter = parameter.astype(jnp.float32)[:, blocks]
        parameter = jnp.pad(parameter, ((0, short), (0, parts * size - parameter.shape[1])))
        return parameter.reshape(-1, parts, size)

    return WordWeight(
        words=jax.lax.bitcast_convert_type(words, jnp.int32),
        scale=of_blocks(scale, kernels[0].group_size),
        offset=of_blocks(offset, kernels[0].group_size),
        out_features=rows,
        in_features=in_features,
        bits=bits,
    )


def _fits(kernel: object) -> TypeGuard[TernaryTensor | IntegerTensor]:
    integers = isinstance(kernel, TernaryTensor | IntegerTensor)
    return (
        integers
        and kernel.in_features >= BLOCK
        and (kernel.group_size % BLOCK == 0 or kernel.group_size >= kernel.in_features)
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


def _vectors(bits: int) -> int:
    """Return how often 8 words a block of 128 columns takes."""
    return -(-BLOCK // LANES // (32 // bits))


def _blocks(in_features: int) -> tuple[int, int]:
    """Return into how many parts the blocks of a row fall, and how many blocks a part has: at most 32."""
    blocks = -(-in_features // BLOCK)
    parts = -(-blocks // _LONGEST)
    return parts, -(-blocks // parts)
