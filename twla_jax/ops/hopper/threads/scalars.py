"""Represents integers and floats of a thread, and passes them to PTX instructions."""

import dataclasses

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith


@dataclasses.dataclass(frozen=True)
class Word:
    """Holds a 32-bit integer of a thread. Numbers beside it are words, too; comparisons are unsigned."""

    value: ir.Value

    def __add__(self, other: "Word | int") -> "Word":
        return self if _is(other, 0) else Word(arith.addi(self.value, _value(other)))

    def __sub__(self, other: "Word | int") -> "Word":
        return self if _is(other, 0) else Word(arith.subi(self.value, _value(other)))

    def __mul__(self, other: "Word | int") -> "Word":
        return self if _is(other, 1) else Word(arith.muli(self.value, _value(other)))

    def __floordiv__(self, other: "Word | int") -> "Word":
        return self if _is(other, 1) else Word(arith.divui(self.value, _value(other)))

    def __mod__(self, other: "Word | int") -> "Word":
        return Word(arith.remui(self.value, _value(other)))

    def __and__(self, other: "Word | int") -> "Word":
        return Word(arith.andi(self.value, _value(other)))

    def __xor__(self, other: "Word | int") -> "Word":
        return Word(arith.xori(self.value, _value(other)))

    def __lshift__(self, bits: "Word | int") -> "Word":
        return self if _is(bits, 0) else Word(arith.shli(self.value, _value(bits)))

    def __rshift__(self, bits: "Word | int") -> "Word":
        """Shift as a signed integer."""
        return self if _is(bits, 0) else Word(arith.shrsi(self.value, _value(bits)))

    def __lt__(self, other: "Word | int") -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.ult, self.value, _value(other))

    def __ge__(self, other: "Word | int") -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.uge, self.value, _value(other))

    def equals(self, other: "Word | int") -> ir.Value:
        """Return whether both are the same."""
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, _value(other))

    def least(self, other: "Word | int") -> "Word":
        """Return the smaller one."""
        return Word(arith.minui(self.value, _value(other)))

    def real(self) -> "Real":
        """Return the float that these bits are."""
        return Real(utils.bitcast(self.value, ir.F32Type.get()))

    def converted(self) -> "Real":
        """Return the float nearest to this signed integer."""
        return Real(arith.sitofp(ir.F32Type.get(), self.value))


@dataclasses.dataclass(frozen=True)
class Real:
    """Holds a float32 of a thread. Numbers beside it are floats, too."""

    value: ir.Value

    def __add__(self, other: "Real | float") -> "Real":
        return Real(arith.addf(self.value, _real_value(other)))

    def __sub__(self, other: "Real | float") -> "Real":
        return Real(arith.subf(self.value, _real_value(other)))

    def __mul__(self, other: "Real | float") -> "Real":
        return Real(arith.mulf(self.value, _real_value(other)))

    def __truediv__(self, other: "Real | float") -> "Real":
        return Real(arith.divf(self.value, _real_value(other)))

    def times_plus(self, factor: "Real | float", more: "Real | float") -> "Real":
        """Return `self · factor + more`, rounded once."""
        return ptx_real("fma.rn.f32 $0, $1, $2, $3;", self, factor, more)

    def least(self, other: "Real | float") -> "Real":
        """Return the smaller one."""
        return Real(arith.minnumf(self.value, _real_value(other)))

    def most(self, other: "Real | float") -> "Real":
        """Return the larger one."""
        return Real(arith.maxnumf(self.value, _real_value(other)))

    def word(self) -> Word:
        """Return its bits."""
        return Word(utils.bitcast(self.value, ir.IntegerType.get_signless(32)))

    def to_bfloat16(self) -> "Real":
        """Return the value rounded to bf16."""
        return unpack_bfloat16(pack_bfloat16(self, self))[0]


def word(value: int) -> Word:
    """Return a constant integer."""
    return Word(_value(value))


def real(value: float) -> Real:
    """Return a constant float."""
    return Real(_real_value(value))


def select[T: (Real, Word)](condition: ir.Value, one: T, other: T) -> T:
    """Return `one` where the condition holds, else `other`; both are words or both floats."""
    return type(one)(arith.select(condition, one.value, other.value))


def both(*conditions: ir.Value) -> ir.Value:
    """Return whether all conditions hold."""
    first, *rest = conditions
    for each in rest:
        first = arith.andi(first, each)
    return first


def pack_bfloat16(low: Real, high: Real) -> Word:
    """Return both numbers, rounded to bf16, in a word."""
    return ptx_words("cvt.rn.bf16x2.f32 $0, $1, $2;", 1, high, low, effects=False)[0]


def pack_float16(low: Real, high: Real) -> Word:
    """Return both numbers, rounded to fp16, in a word."""
    return ptx_words("cvt.rn.f16x2.f32 $0, $1, $2;", 1, high, low, effects=False)[0]


def unpack_bfloat16(pair: Word) -> tuple[Real, Real]:
    """Return the lower and the upper half as floats."""
    return (pair << 16).real(), (pair & 0xFFFF0000).real()


def ptx_words(ptx: str, count: int, *operands, effects: bool = True, convergent: bool = False) -> list[Word]:
    """Return what an instruction leaves in `count` registers, `$0` and on; its operands come after them."""
    i32 = ir.IntegerType.get_signless(32)
    values = utils.inline_ptx(
        ptx,
        *map(operand, operands),
        result_types=[i32] * count,
        has_side_effects=effects,
        convergent=convergent,
    )
    return [Word(value) for value in values]


def ptx_reals(ptx: str, count: int, *operands) -> list[Real]:
    """Return the floats that an instruction of a whole warp leaves in `count` registers; its operands come after."""
    f32 = ir.F32Type.get()
    values = utils.inline_ptx(ptx, *map(operand, operands), result_types=[f32] * count, convergent=True)
    return [Real(value) for value in values]


def ptx_real(ptx: str, *operands, effects: bool = False) -> Real:
    """Return the float that an instruction leaves in `$0`; its operands are `$1` and on."""
    values = [_real_value(each) if isinstance(each, float | int) else operand(each) for each in operands]
    return Real(utils.inline_ptx(ptx, *values, result_types=ir.F32Type.get(), has_side_effects=effects))


def registers(count: int, first: int = 0) -> str:
    """Return a list of `count` registers from `first` on, as vector instructions write it."""
    return "{" + ",".join(f"${first + i}" for i in range(count)) + "}" if count > 1 else f"${first}"


def operand(value) -> ir.Value:
    """Return the value that an instruction takes for a word, a float or a constant."""
    if isinstance(value, ir.Value):
        return value
    return value.value if isinstance(value, Word | Real) else _value(value)


def _value(other: Word | int) -> ir.Value:
    if isinstance(other, Word):
        return other.value
    signed = other - (1 << 32) if other >= 1 << 31 else other
    return utils.c(signed, ir.IntegerType.get_signless(32))


def _real_value(other: Real | float) -> ir.Value:
    return other.value if isinstance(other, Real) else utils.c(float(other), ir.F32Type.get())


def _is(other: Word | int, value: int) -> bool:
    return isinstance(other, int) and other == value
