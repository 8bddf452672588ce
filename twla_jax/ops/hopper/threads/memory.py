"""Reads and writes shared and global memory. Addresses are those of shared memory, in bytes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from twla_jax.ops.hopper.threads.scalars import Real, Word, operand, ptx_real, ptx_words, registers
from twla_jax.ops.hopper.threads.together import warp_barrier


def bits(ref: ir.Value) -> int:
    """Return the bits of one element of a reference."""
    return utils.bitwidth(ir.MemRefType(ref.type).element_type)


def shape(ref: ir.Value) -> list[int]:
    """Return the shape of a reference."""
    return list(ir.MemRefType(ref.type).shape)


def readable(x: jax.Array) -> jax.Array:
    """Return the array, in float32 unless kernels can read its dtype as it is."""
    return x if x.dtype in (jnp.bfloat16, jnp.float32) else x.astype(jnp.float32)


def address(ref: ir.Value) -> Word:
    """Return the address of a reference's first byte in shared memory."""
    return Word(llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref)))


def load(at: Word, count: int = 1, *, offset: int = 0) -> list[Word]:
    """Return 1, 2 or 4 words; the address is aligned to as many."""
    vector = "" if count == 1 else f".v{count}"
    return ptx_words(f"ld.shared{vector}.b32 {registers(count)}, [${count}+{offset}];", count, at)


def load_short(at: Word, *, offset: int = 0) -> Word:
    """Return 16 bits, with zeros above them."""
    return ptx_words(f"ld.shared.u16 $0, [$1+{offset}];", 1, at)[0]


def load_matrices(at: Word) -> list[Word]:
    """Return four matrices of 8 rows by 16 bytes, whose rows start where lanes 0 to 31 say: `ldmatrix`."""
    return ptx_words(
        f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers(4)}, [$4];", 4, at, convergent=True
    )


def store(at: Word, *values: Word | Real, offset: int = 0) -> None:
    """Store 1, 2 or 4 words; the address is aligned to as many."""
    count = len(values)
    vector = "" if count == 1 else f".v{count}"
    ptx = f"st.shared{vector}.b32 [${count}+{offset}], {registers(count)};"
    utils.inline_ptx(ptx, *(operand(value) for value in values), at.value, has_side_effects=True)


def store_byte(at: Word, value: Word, *, offset: int = 0, condition: ir.Value | None = None) -> None:
    """Store the lowest byte where the condition holds."""
    # Without the cvt, ptxas would convert a register that was computed as a float.
    convert, to = ".reg .b16 h; cvt.u16.u32 h, $0;", f"st.shared.b8 [$1+{offset}], h;"
    if condition is None:
        ptx, more = f"{{{convert} {to}}}", []
    else:
        ptx = f"{{.reg .pred p; setp.ne.b32 p, $2, 0; {convert} @p {to}}}"
        more = [arith.extui(ir.IntegerType.get_signless(32), condition)]
    utils.inline_ptx(ptx, value.value, at.value, *more, has_side_effects=True)


def address_of_block(at: Word, block: Word) -> Word:
    """Return the same address in another block of the cluster."""
    return ptx_words("mapa.shared::cluster.u32 $0, $1, $2;", 1, at, block, effects=False)[0]


def store_of_block(at: Word, value: Real, *, offset: int = 0) -> None:
    """Store a float32 at an address of another block."""
    ptx = f"st.shared::cluster.f32 [$1+{offset}], $0;"
    utils.inline_ptx(ptx, value.value, at.value, has_side_effects=True)


def load_global(
    ref: ir.Value, offset: Word, count: int = 1, *, condition: ir.Value | None = None
) -> list[Word]:
    """Return 1, 2 or 4 words, `offset` bytes from a reference's first; zeros where the condition does not hold."""
    vector = "" if count == 1 else f".v{count}"
    copy = f"ld.global{vector}.b32 {registers(count)}, [${count}];"
    if condition is None:
        return ptx_words(copy, count, _global(ref, offset))
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
    flag = Word(arith.extui(ir.IntegerType.get_signless(32), condition))
    ptx = f"{{.reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {zeros} @p {copy}}}"
    return ptx_words(ptx, count, _global(ref, offset), flag)


def copy(at: Word, ref: ir.Value, offset: Word, count: int, *, condition: ir.Value) -> None:
    """Start a copy of 1, 2 or 4 words, `offset` bytes from a reference's first, to shared memory: `cp.async`."""
    copy = f"cp.async.{'cg' if count == 4 else 'ca'}.shared.global [$0], [$1], {4 * count};"
    flag = arith.extui(ir.IntegerType.get_signless(32), condition)
    ptx = f"{{.reg .pred p; setp.ne.b32 p, $2, 0; @p {copy}}}"
    utils.inline_ptx(ptx, at.value, _global(ref, offset), flag, has_side_effects=True)


def end_copies() -> None:
    """End a batch of copies: those that this thread has started since the last batch."""
    utils.inline_ptx("cp.async.commit_group;", has_side_effects=True)


def wait_for_copies(count: int) -> None:
    """Wait until the copies of all lanes of a warp are done, but for those of the last `count` batches."""
    utils.inline_ptx(f"cp.async.wait_group {count};", has_side_effects=True)
    warp_barrier()


def load_real(ref: ir.Value, index: Word) -> Real:
    """Return a number in global memory, of 32 or 16 bits."""
    if bits(ref) == 32:
        return load_global(ref, index * 4)[0].real()
    ptx = f"{{.reg .b16 h; ld.global.b16 h, [$1]; cvt.f32.{_kind(ref)} $0, h;}}"
    return ptx_real(ptx, _global(ref, index * 2), effects=True)


def store_real(ref: ir.Value, index: Word, value: Real) -> None:
    """Store a number in global memory, of 32 or 16 bits."""
    if bits(ref) == 32:
        utils.inline_ptx(
            "st.global.f32 [$1], $0;", value.value, _global(ref, index * 4), has_side_effects=True
        )
        return
    ptx = f"{{.reg .b16 h; cvt.rn.{_kind(ref)}.f32 h, $0; st.global.b16 [$1], h;}}"
    utils.inline_ptx(ptx, value.value, _global(ref, index * 2), has_side_effects=True)


def store_global_words(ref: ir.Value, offset: Word, values: Sequence[Word]) -> None:
    """Store 1, 2 or 4 words in global memory."""
    pointer, count = _global(ref, offset), len(values)
    ptx = f"st.global{'' if count == 1 else f'.v{count}'}.b32 [${count}], {registers(count)};"
    utils.inline_ptx(ptx, *(each.value for each in values), pointer, has_side_effects=True)


def send(ref: ir.Value, offset: Word, value: Word) -> None:
    """Store a word, `offset` bytes from a reference's first, for the threads that `receive` it."""
    ptx = "st.relaxed.gpu.global.b32 [$1], $0;"
    utils.inline_ptx(ptx, value.value, _global(ref, offset), has_side_effects=True)


def receive(ref: ir.Value, offsets: Sequence[Word], tag: Word) -> list[Word]:
    """Return four words at each offset, in bytes, as soon as the upper half of every one equals the tag's."""
    count = 4 * len(offsets)
    loads = "".join(
        f" ld.relaxed.gpu.global.v4.b32 {registers(4, i)}, [${count + i // 4}];" for i in range(0, count, 4)
    )
    # Collect the bits that differ in any of the words.
    wanted = f"${count + len(offsets)}"
    compare = f" xor.b32 a, $0, {wanted};"
    compare += "".join(f" xor.b32 b, ${i}, {wanted}; or.b32 a, a, b;" for i in range(1, count))
    again = "setp.ge.u32 p, a, 0x10000; @p bra again;"
    ptx = f"{{.reg .pred p; .reg .b32 a, b; again: {loads} {compare} {again}}}"
    return ptx_words(ptx, count, *(_global(ref, offset) for offset in offsets), tag)


def rounded(value: Real, ref: ir.Value) -> Real:
    """Return the value as `store_real` would store it in the reference, of float32 or bf16."""
    return value if bits(ref) == 32 else value.to_bfloat16()


def _global(ref: ir.Value, offset: Word) -> ir.Value:
    i64 = ir.IntegerType.get_signless(64)
    return arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(ref)), arith.extui(i64, offset.value))


def _kind(ref: ir.Value) -> str:
    return str(ir.MemRefType(ref.type).element_type)
