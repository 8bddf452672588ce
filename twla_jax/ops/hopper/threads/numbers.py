"""Computes with bf16 numbers and bytes in words, functions of a number, and products of bytes."""

from collections.abc import Sequence

from twla_jax.ops.hopper.threads.scalars import (
    Real,
    Word,
    ptx_real,
    ptx_reals,
    ptx_words,
    unpack_bfloat16,
    word,
)

WHOLE = 1.5 * 2**23  # floats of this size are whole numbers, with their lowest byte's in two's complement


def least_bfloat16(one: Word, other: Word) -> Word:
    """Return the smaller of both words' lower halves, and of their upper halves."""
    return ptx_words("min.bf16x2 $0, $1, $2;", 1, one, other, effects=False)[0]


def most_bfloat16(one: Word, other: Word) -> Word:
    """Return the larger of both words' lower halves, and of their upper halves."""
    return ptx_words("max.bf16x2 $0, $1, $2;", 1, one, other, effects=False)[0]


def multiply_bfloat16(one: Word, other: Word) -> Word:
    """Return the products of both words' halves, each rounded."""
    return ptx_words("mul.rn.bf16x2 $0, $1, $2;", 1, one, other, effects=False)[0]


def eight_reals(words: Sequence[Word]) -> list[Real]:
    """Return eight floats: the bf16 halves of four words, or eight words of float32."""
    if len(words) == 8:
        return [word.real() for word in words]
    return [half for pair in words for half in unpack_bfloat16(pair)]


def signed_bytes(word: Word) -> list[Real]:
    """Return the four signed bytes as floats."""
    # Unsigned bytes are the lowest bits of floats that are whole numbers.
    unsigned, sign, size = word ^ 0x80808080, 2.0**23 + 128, 0x4B000000
    floats = [
        ptx_words(f"prmt.b32 $0, $1, $2, 0x744{i};", 1, unsigned, size, effects=False) for i in range(4)
    ]
    return [each.real() - sign for (each,) in floats]


def float16_bytes(word: Word) -> tuple[Word, Word]:
    """Return the signed bytes in fp16: the two lower ones in a word, and the two upper ones."""
    # Unsigned bytes are the lowest bits of fp16 numbers from 1024 on.
    unsigned, sign = word ^ 0x80808080, 0x64806480  # of 1024 + 128, twice
    low, high = (permute(unsigned, 0x64646464, order) for order in (0x4140, 0x4342))
    low, high = (ptx_words("sub.f16x2 $0, $1, $2;", 1, each, sign, effects=False)[0] for each in (low, high))
    return low, high


def permute(one: Word, other: Word | int, order: int) -> Word:
    """Return four bytes of both words; digit i of `order` says which: 0 to 3 of the one, 4 to 7 of the other."""
    return ptx_words(f"prmt.b32 $0, $1, $2, {order};", 1, one, other, effects=False)[0]


def pack_bytes(values: Sequence[Real]) -> Word:
    """Return four whole numbers from −128 to 127 as signed bytes of a word."""
    first, *rest = ((each + WHOLE).word() & 0xFF for each in values)
    for i, each in enumerate(rest, 1):
        first = first + (each << 8 * i)
    return first


def power_of_two(value: Real) -> Real:
    """Return `2 ** value`, to about two units in the last place."""
    return ptx_real("ex2.approx.ftz.f32 $0, $1;", value)


def exponential(value: Real) -> Real:
    """Return `exp(value)`, to about two units in the last place."""
    return power_of_two(value * 1.4426950408889634)


def logarithm(value: Real) -> Real:
    """Return the logarithm to the base of two."""
    return ptx_real("lg2.approx.ftz.f32 $0, $1;", value)


def reciprocal(value: Real) -> Real:
    """Return `1 / value`, to about one unit in the last place."""
    return ptx_real("rcp.approx.ftz.f32 $0, $1;", value)


def reciprocal_root(value: Real) -> Real:
    """Return `1 / sqrt(value)`, to about two units in the last place."""
    return ptx_real("rsqrt.approx.f32 $0, $1;", value)


def nearest(value: Real) -> Real:
    """Return the nearest whole number, the even one of two."""
    return ptx_real("cvt.rni.f32.f32 $0, $1;", value)


def sum_of_bytes(value: Word, so_far: Word | int = 0) -> Word:
    """Return `so_far` plus the four signed bytes."""
    return ptx_words("dp4a.s32.s32 $0, $1, $2, $3;", 1, value, word(0x01010101), so_far, effects=False)[0]


def multiply_halves(a: Word, b: Word, so_far: Word) -> Word:
    """Return `so_far` plus a's halves times b's lowest two bytes, lower by lower, all signed."""
    return ptx_words("dp2a.lo.s32.s32 $0, $1, $2, $3;", 1, a, b, so_far, effects=False)[0]


def multiply_bytes(a: Sequence[Word], b: Sequence[Word], so_far: Sequence[Word]) -> list[Word]:
    """Return `so_far` plus 16 rows by 32 unsigned bytes times 32 signed bytes by 8 columns: `mma.sync`."""
    ptx = (
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return ptx_words(ptx, 4, *a, *b, *so_far, effects=False, convergent=True)


def multiply_16_bits(
    a: Sequence[Word], b: Sequence[Word], so_far: Sequence[Real], *, bfloat16: bool
) -> list[Real]:
    """Return `so_far` plus 16 rows by 16 numbers times 16 numbers by 8 columns, of bf16 or fp16: `mma.sync`."""
    kind = "bf16" if bfloat16 else "f16"
    ptx = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return ptx_reals(ptx, 4, *a, *b, *so_far)
