"""Words for what a thread of a GPU kernel does, one instruction each, where Pallas has none (Mosaic GPU, inline PTX).

Functions that use them are wrapped in `on_threads`, and run on every thread. Addresses are those of shared memory, in
bytes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

# Its annotations speak of functions as Mosaic sees them, not Pallas.
on_threads: Any = plgpu.inline_mgpu
WARP = 32
WHOLE = 1.5 * 2**23  # floats of this size are whole numbers, with their lowest byte's in two's complement
_BARRIER = 15  # of 16; Mosaic takes 0 for a block, and one for each warpgroup after it


@dataclasses.dataclass(frozen=True)
class Word:
    """A 32-bit integer of a thread; numbers beside it are words, too. Comparisons are unsigned."""

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

    def __lt__(self, other: "Word | int") -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.ult, self.value, _value(other))

    def __ge__(self, other: "Word | int") -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.uge, self.value, _value(other))

    def equals(self, other: "Word | int") -> ir.Value:
        """Whether both are the same."""
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, _value(other))

    def least(self, other: "Word | int") -> "Word":
        """The smaller one."""
        return Word(arith.minui(self.value, _value(other)))

    def real(self) -> "Real":
        """The float that these bits are."""
        return Real(utils.bitcast(self.value, ir.F32Type.get()))

    def converted(self) -> "Real":
        """The float nearest to this signed integer."""
        return Real(arith.sitofp(ir.F32Type.get(), self.value))


@dataclasses.dataclass(frozen=True)
class Real:
    """A float32 of a thread; numbers beside it are such, too."""

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
        """`self · factor + more`, rounded once."""
        return _ptx_real("fma.rn.f32 $0, $1, $2, $3;", self, factor, more)

    def least(self, other: "Real | float") -> "Real":
        """The smaller one."""
        return Real(arith.minnumf(self.value, _real_value(other)))

    def most(self, other: "Real | float") -> "Real":
        """The larger one."""
        return Real(arith.maxnumf(self.value, _real_value(other)))

    def word(self) -> Word:
        """Its bits."""
        return Word(utils.bitcast(self.value, ir.IntegerType.get_signless(32)))

    def to_bfloat16(self) -> "Real":
        """Rounded to bf16."""
        return unpack_bfloat16(pack_bfloat16(self, self))[0]


def bits(ref: ir.Value) -> int:
    """Of a number in a reference's memory."""
    return utils.bitwidth(ir.MemRefType(ref.type).element_type)


def shape(ref: ir.Value) -> list[int]:
    """A reference's."""
    return list(ir.MemRefType(ref.type).shape)


def readable(x: jax.Array) -> jax.Array:
    """The array, in float32 unless it is of a type that can be read as it is."""
    return x if x.dtype in (jnp.bfloat16, jnp.float32) else x.astype(jnp.float32)


def word(value: int) -> Word:
    """A constant."""
    return Word(_value(value))


def real(value: float) -> Real:
    """A constant."""
    return Real(_real_value(value))


def select[T: (Real, Word)](condition: ir.Value, one: T, other: T) -> T:
    """One where the condition holds, else the other; both words or both floats."""
    return type(one)(arith.select(condition, one.value, other.value))


def both(*conditions: ir.Value) -> ir.Value:
    """Whether all hold."""
    first, *rest = conditions
    for each in rest:
        first = arith.andi(first, each)
    return first


def thread() -> Word:
    """This thread's number in its block."""
    return Word(arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x)))


def splat_word(array: mgpu.FragmentedArray) -> Word:
    """The integer that all threads were given."""
    return Word(array.registers.flat[0])


def splat_real(array: mgpu.FragmentedArray) -> Real:
    """The float that all threads were given."""
    return Real(array.registers.flat[0])


def as_splat(value: Real) -> mgpu.FragmentedArray:
    """A float that is the same on all threads, for Pallas."""
    return mgpu.FragmentedArray.splat(value.value, ())


def per_thread(count: int):
    """The layout in which Pallas carries so many 32-bit values of a thread from one function to the next."""
    return plgpu.Layout.WG_STRIDED((128 * count,), vec_size=1)


def values(count: int, dtype):
    """What a function returns that returns `as_array` of so many."""
    return plgpu.ShapeDtypeStruct((128 * count,), dtype, layout=per_thread(count))


def as_array(values: Sequence["Word | Real"]) -> mgpu.FragmentedArray:
    """Values of a thread in the layout `per_thread`."""
    registers = np.empty(len(values), dtype=object)
    for i, each in enumerate(values):
        registers[i] = vector.broadcast(ir.VectorType.get((1,), each.value.type), each.value)
    signed = True if isinstance(values[0], Word) else None
    layout = per_thread(len(values)).to_mgpu()
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def words(array: mgpu.FragmentedArray) -> list[Word]:
    """What `as_array` was given."""
    return [Word(each) for each in _registers(array)]


def reals(array: mgpu.FragmentedArray) -> list[Real]:
    """What `as_array` was given; or a thread's numbers of an array in another layout, register by register."""
    return [Real(each) for each in _registers(array)]


def bfloat16_pairs(array: mgpu.FragmentedArray) -> list[Word]:
    """A thread's bf16 numbers of an array, two by two as they lie in registers."""
    return [Word(utils.bitcast(each, ir.IntegerType.get_signless(32))) for each in array.registers.flat]


def barrier(count: int) -> None:
    """Waits for the first `count` threads of the block."""
    utils.inline_ptx(f"bar.sync {_BARRIER}, {count};", has_side_effects=True, convergent=True)


def cluster_arrive() -> None:
    """Tells the cluster's blocks that this thread has come here, with all that it wrote to shared memory before."""
    utils.inline_ptx("barrier.cluster.arrive.release.aligned;", has_side_effects=True, convergent=True)


def cluster_wait() -> None:
    """Waits until all threads of the cluster's blocks have arrived."""
    utils.inline_ptx("barrier.cluster.wait.acquire.aligned;", has_side_effects=True, convergent=True)


def cluster_barrier() -> None:
    """Waits for all threads of the cluster's blocks, and for what they wrote to shared memory."""
    cluster_arrive()
    cluster_wait()


def publish() -> None:
    """Makes this thread's writes to shared memory visible to the tensor cores and the copy engine."""
    utils.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)


def when(condition: ir.Value):
    """A context for what is done where the condition holds."""
    return utils.when(condition)


def address(ref: ir.Value) -> Word:
    """Of a reference's first byte in shared memory."""
    return Word(llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref)))


def load(at: Word, count: int = 1, *, offset: int = 0) -> list[Word]:
    """1, 2 or 4 words, as many words aligned."""
    vector = "" if count == 1 else f".v{count}"
    return _ptx_words(f"ld.shared{vector}.b32 {_list(count)}, [${count}+{offset}];", count, at)


def address_of_block(at: Word, block: Word) -> Word:
    """The same address in another block of the cluster."""
    return _ptx_words("mapa.shared::cluster.u32 $0, $1, $2;", 1, at, block, effects=False)[0]


def store_of_block(at: Word, value: Real, *, offset: int = 0) -> None:
    """A float32 to such an address."""
    ptx = f"st.shared::cluster.f32 [$1+{offset}], $0;"
    utils.inline_ptx(ptx, value.value, at.value, has_side_effects=True)


def load_half(at: Word, *, offset: int = 0) -> Real:
    """A float16."""
    ptx = f"{{.reg .b16 h; ld.shared.b16 h, [$1+{offset}]; cvt.f32.f16 $0, h;}}"
    return _ptx_real(ptx, at, effects=True)


def load_matrices(at: Word) -> list[Word]:
    """Four matrices of 8 rows by 16 bytes, whose rows start where lanes 0 to 31 say: `ldmatrix`."""
    return _ptx_words(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {_list(4)}, [$4];", 4, at, convergent=True)


def store(at: Word, *values: Word | Real, offset: int = 0) -> None:
    """1, 2 or 4 words, as many words aligned."""
    count = len(values)
    vector = "" if count == 1 else f".v{count}"
    ptx = f"st.shared{vector}.b32 [${count}+{offset}], {_list(count)};"
    utils.inline_ptx(ptx, *(_bits(value) for value in values), at.value, has_side_effects=True)


def store_byte(at: Word, value: Word, *, offset: int = 0, condition: ir.Value | None = None) -> None:
    """The lowest byte, where the condition holds."""
    # Of a register that was computed as a float, ptxas would convert the number.
    convert, to = ".reg .b16 h; cvt.u16.u32 h, $0;", f"st.shared.b8 [$1+{offset}], h;"
    if condition is None:
        ptx, more = f"{{{convert} {to}}}", []
    else:
        ptx = f"{{.reg .pred p; setp.ne.b32 p, $2, 0; {convert} @p {to}}}"
        more = [arith.extui(ir.IntegerType.get_signless(32), condition)]
    utils.inline_ptx(ptx, value.value, at.value, *more, has_side_effects=True)


def load_global(
    ref: ir.Value, offset: Word, count: int = 1, *, condition: ir.Value | None = None
) -> list[Word]:
    """1, 2 or 4 words so many bytes from a reference's first; zeros where the condition does not hold."""
    vector = "" if count == 1 else f".v{count}"
    copy = f"ld.global{vector}.b32 {_list(count)}, [${count}];"
    if condition is None:
        return _ptx_words(copy, count, _global(ref, offset))
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
    flag = Word(arith.extui(ir.IntegerType.get_signless(32), condition))
    ptx = f"{{.reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {zeros} @p {copy}}}"
    return _ptx_words(ptx, count, _global(ref, offset), flag)


def load_real(ref: ir.Value, index: Word) -> Real:
    """A number in global memory, of 32 or 16 bits."""
    if bits(ref) == 32:
        return load_global(ref, index * 4)[0].real()
    ptx = f"{{.reg .b16 h; ld.global.b16 h, [$1]; cvt.f32.{_kind(ref)} $0, h;}}"
    return _ptx_real(ptx, _global(ref, index * 2), effects=True)


def store_real(ref: ir.Value, index: Word, value: Real) -> None:
    """A number in global memory, of 32 or 16 bits."""
    if bits(ref) == 32:
        utils.inline_ptx(
            "st.global.f32 [$1], $0;", value.value, _global(ref, index * 4), has_side_effects=True
        )
        return
    ptx = f"{{.reg .b16 h; cvt.rn.{_kind(ref)}.f32 h, $0; st.global.b16 [$1], h;}}"
    utils.inline_ptx(ptx, value.value, _global(ref, index * 2), has_side_effects=True)


def rounded(value: Real, ref: ir.Value) -> Real:
    """As `store_real` would store it in the reference, of float32 or bf16."""
    return value if bits(ref) == 32 else value.to_bfloat16()


def store_global_words(ref: ir.Value, offset: Word, values: Sequence[Word]) -> None:
    """Four words."""
    pointer = _global(ref, offset)
    ptx = f"st.global.v4.b32 [$4], {_list(4)};"
    utils.inline_ptx(ptx, *(each.value for each in values), pointer, has_side_effects=True)


def pack_bfloat16(low: Real, high: Real) -> Word:
    """Both, rounded, in a word."""
    return _ptx_words("cvt.rn.bf16x2.f32 $0, $1, $2;", 1, high, low, effects=False)[0]


def unpack_bfloat16(pair: Word) -> tuple[Real, Real]:
    """The lower and the upper half."""
    return (pair << 16).real(), (pair & 0xFFFF0000).real()


def least_bfloat16(one: Word, other: Word) -> Word:
    """Of both words' lower halves the smaller one, and of the upper ones."""
    return _ptx_words("min.bf16x2 $0, $1, $2;", 1, one, other, effects=False)[0]


def most_bfloat16(one: Word, other: Word) -> Word:
    """Of both words' lower halves the larger one, and of the upper ones."""
    return _ptx_words("max.bf16x2 $0, $1, $2;", 1, one, other, effects=False)[0]


def eight_reals(words: Sequence[Word]) -> list[Real]:
    """Four words' bf16 halves, or eight words' float32."""
    if len(words) == 8:
        return [word.real() for word in words]
    return [half for pair in words for half in unpack_bfloat16(pair)]


def signed_bytes(word: Word) -> list[Real]:
    """The four signed bytes."""
    # Unsigned ones are the lowest bits of floats that are whole numbers.
    unsigned, sign, size = word ^ 0x80808080, 2.0**23 + 128, 0x4B000000
    parts = [
        _ptx_words(f"prmt.b32 $0, $1, $2, 0x744{i};", 1, unsigned, size, effects=False) for i in range(4)
    ]
    return [part.real() - sign for (part,) in parts]


def pack_bytes(values: Sequence[Real]) -> Word:
    """Four whole numbers of −128 to 127, as signed bytes."""
    first, *rest = ((each + WHOLE).word() & 0xFF for each in values)
    for i, each in enumerate(rest, 1):
        first = first + (each << 8 * i)
    return first


def shuffle[T: (Real, Word)](value: T, distance: int) -> T:
    """The value of the lane whose number differs in the bit `distance`."""
    return type(value)(utils.shfl_bfly(value.value, distance))


def of_lane(value: Real, lane: int) -> Real:
    """The value of one lane, for all of its warp."""
    ptx = f"shfl.sync.idx.b32 $0, $1, {lane}, 31, 0xffffffff;"
    return _ptx_words(ptx, 1, value, convergent=True)[0].real()


def warp_least(value: Real) -> Real:
    """The least of a warp."""
    return _ordered(_reduce(_ordered(value.word()), "min")).real()


def warp_most(value: Real) -> Real:
    """The largest of a warp."""
    return _ordered(_reduce(_ordered(value.word()), "max")).real()


def power_of_two(value: Real) -> Real:
    """`2 ** value`, to about two units in the last place."""
    return _ptx_real("ex2.approx.ftz.f32 $0, $1;", value)


def exponential(value: Real) -> Real:
    """`exp`, to about two units in the last place."""
    return power_of_two(value * 1.4426950408889634)


def reciprocal(value: Real) -> Real:
    """`1 / value`, to about one unit in the last place."""
    return _ptx_real("rcp.approx.ftz.f32 $0, $1;", value)


def reciprocal_root(value: Real) -> Real:
    """`1 / sqrt`, to about two units in the last place."""
    return _ptx_real("rsqrt.approx.f32 $0, $1;", value)


def nearest(value: Real) -> Real:
    """The nearest whole number, of two the even one."""
    return _ptx_real("cvt.rni.f32.f32 $0, $1;", value)


def sum_of_bytes(value: Word, so_far: Word | int = 0) -> Word:
    """The four signed bytes added up."""
    return _ptx_words("dp4a.s32.s32 $0, $1, $2, $3;", 1, value, word(0x01010101), so_far, effects=False)[0]


def multiply_bytes(a: Sequence[Word], b: Sequence[Word], so_far: Sequence[Word]) -> list[Word]:
    """`mma.sync` of 16 rows by 32 unsigned bytes and 32 signed bytes by 8 columns."""
    ptx = (
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return _ptx_words(ptx, 4, *a, *b, *so_far, effects=False, convergent=True)


def _registers(array: mgpu.FragmentedArray) -> list[ir.Value]:
    return [
        vector.extract(each, dynamic_position=[], static_position=[i])
        for each in array.registers.flat
        for i in range(ir.VectorType(each.type).shape[0])
    ]


def _ordered(bits: Word) -> Word:
    """Floats' bits as integers in the same order, and back."""
    sign = Word(arith.shrsi(bits.value, _value(31)))
    return bits ^ (sign & 0x7FFFFFFF)


def _reduce(value: Word, kind: str) -> Word:
    return _ptx_words(f"redux.sync.{kind}.s32 $0, $1, 0xffffffff;", 1, value, convergent=True)[0]


def _global(ref: ir.Value, offset: Word) -> ir.Value:
    i64 = ir.IntegerType.get_signless(64)
    return arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(ref)), arith.extui(i64, offset.value))


def _kind(ref: ir.Value) -> str:
    return str(ir.MemRefType(ref.type).element_type)


def _list(count: int) -> str:
    return "{" + ",".join(f"${i}" for i in range(count)) + "}" if count > 1 else "$0"


def _ptx_words(ptx: str, count: int, *operands, effects: bool = True, convergent: bool = False) -> list[Word]:
    i32 = ir.IntegerType.get_signless(32)
    values = utils.inline_ptx(
        ptx,
        *map(_bits, operands),
        result_types=[i32] * count,
        has_side_effects=effects,
        convergent=convergent,
    )
    return [Word(value) for value in values]


def _ptx_real(ptx: str, *operands, effects: bool = False) -> Real:
    values = [_real_value(each) if isinstance(each, float | int) else _bits(each) for each in operands]
    return Real(utils.inline_ptx(ptx, *values, result_types=ir.F32Type.get(), has_side_effects=effects))


def _bits(value) -> ir.Value:
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
