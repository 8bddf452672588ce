"""Holds integer weights as 32-bit words, as `word_product` reads them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, TypeGuard

import jax
from jaxtyping import Array, Float32, Int32

from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import IntegerTensor, TernaryTensor

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
    forms = {(field_bits(kernel), kernel.group_size) for kernel in kernels if _fits(kernel)}
    return len(forms) == 1 and all(_fits(kernel) for kernel in kernels)


def field_bits(kernel: TernaryTensor | IntegerTensor) -> int:
    """Return the bits of a field: 2 for one plane, 10 for two, 2, 4 or 8 for integers."""
    if isinstance(kernel, TernaryTensor):
        return 2 if kernel.residual_codes is None else 10
    return next(bits for bits in (2, 4, 8) if bits >= kernel.bits)


def word_bytes(kernel: PackedTensor) -> int:
    """Return the bytes that a stack of matrices takes as words, scales included; 0 if those do not fit."""
    if not _fits(kernel):
        return 0
    parts, size = blocks_of(kernel.in_features)
    rows = -(-kernel.shape[-2] // ROWS) * ROWS
    numbers = vectors_of(field_bits(kernel)) * LANES + 2
    return math.prod(kernel.shape[:-2]) * rows * parts * size * numbers * 4


def _fits(kernel: object) -> TypeGuard[TernaryTensor | IntegerTensor]:
    integers = isinstance(kernel, TernaryTensor | IntegerTensor)
    return (
        integers
        and kernel.in_features >= BLOCK
        and (kernel.group_size % BLOCK == 0 or kernel.group_size >= kernel.in_features)
    )


def vectors_of(bits: int) -> int:
    """Return how often 8 words a block of 128 columns takes."""
    return -(-BLOCK // LANES // (32 // bits))


def blocks_of(in_features: int) -> tuple[int, int]:
    """Return into how many parts the blocks of a row fall, and how many blocks a part has: at most 32."""
    blocks = -(-in_features // BLOCK)
    parts = -(-blocks // _LONGEST)
    return parts, -(-blocks // parts)
