"""Unpacks codes to the operands of `mma.sync`, register by register.

Mosaic GPU has no shifts on 8-bit vectors, so this is written against its registers: each holds four consecutive bytes
of one weight row, whose plane i of two-bit codes is `(w >> 2i) & 0x03030303`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Array, Int32

from twla_jax.core.packing import PLANE


def unpack(packed: jax.Array, plane: int, rows: int, *, bits: int, offset: int) -> jax.Array:
    """Return `[PLANE, rows]` codes less their offset in bf16, as the right operand of `plgpu.mma`, in `unpacked_order`.

    Args:
      packed: bytes in the layout `MMA_RHS(int8, m_warps=1)`.
      plane: which codes of a byte.
      rows: of the weight.
      bits: of a code: 2, 4 or 8.
      offset: by which stored codes are too large; 128 for 8 bits.
    """
    layout = plgpu.Layout.MMA_RHS(jnp.bfloat16, m_warps=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.MMA_RHS(jnp.int8, m_warps=1),),
        return_type=plgpu.ShapeDtypeStruct((PLANE, rows), jnp.bfloat16, layout=layout),
    )
    def convert_registers(_, array):
        registers = _to_bfloat16(array.registers, plane, bits, offset)
        target = layout.to_mgpu()
        return mgpu.FragmentedArray(
            _registers=registers.reshape(target.registers_shape((PLANE, rows))),
            _layout=target,
            _is_signed=None,
        )

    return convert_registers(packed)  # pyright: ignore[reportCallIssue]


def unpack_rows(
    packed: jax.Array, plane: int, *, exact: bool = False, wide: bool = False
) -> tuple[jax.Array, int]:
    """Return `[rows, PLANE]` codes U times a factor, in int8, as the left operand of `plgpu.mma`; and the factor.

    Codes that are left where they lie in their bytes, 4 and 16 times too large, cost one operation less than codes
    shifted into place. Those of the last plane would not fit int8.

    Args:
      packed: bytes in the layout `MMA_LHS(int8)`, or `WGMMA_8BIT` if wide.
      plane: which codes of a byte.
      exact: the factor is 1.
      wide: for `plgpu.wgmma` and not `plgpu.mma`.
    """
    shift, place = (2 * plane, 0) if exact or plane == 3 else (0, 2 * plane)
    layout = plgpu.Layout.WGMMA_8BIT if wide else plgpu.Layout.MMA_LHS(jnp.int8)

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(packed.shape, jnp.int8, layout=layout),
    )
    def convert_registers(_, array):
        out = np.empty_like(array.registers)
        for index, register in np.ndenumerate(array.registers):
            word = _shifted(register, shift)
            out[index] = utils.bitcast(arith.andi(word, _word(0x03030303 << place)), register.type)
        return mgpu.FragmentedArray(_registers=out, _layout=array.layout, _is_signed=True)

    return convert_registers(packed), 1 << place  # pyright: ignore[reportCallIssue]


def unpack_weights(packed: jax.Array, plane: int, pairs: Int32[Array, " rows"]) -> jax.Array:
    """Return `[rows, PLANE]` weights `α·U + μ` in int8, as the left operand of `plgpu.wgmma`.

    Four codes are multiplied at once: none carries into the next, as the weights, raised by 128, fit their bytes.

    Args:
      packed: bytes in the layout `WGMMA_8BIT`.
      plane: which codes of a byte.
      pairs: of α and μ, such that no weight leaves int8, in the layout `WGMMA_8BIT.reduce(1)`.
    """
    layout = plgpu.Layout.WGMMA_8BIT

    @plgpu.inline_mgpu(
        arg_types=(layout, *[layout.reduce(1)] * 2),
        return_type=plgpu.ShapeDtypeStruct(packed.shape, jnp.int8, layout=layout),
    )
    def convert_registers(_, array, alpha, raised_mu):
        i32 = ir.IntegerType.get_signless(32)
        factors, offsets = (
            [utils.bitcast(register, i32) for register in each.registers.flat] for each in (alpha, raised_mu)
        )
        offsets = [arith.muli(offset, _word(0x01010101)) for offset in offsets]
        # A thread has two rows, which alternate.
        registers = array.registers.reshape(-1, 2)
        out = np.empty_like(registers)
        for (column, row), register in np.ndenumerate(registers):
            codes = arith.andi(_shifted(register, 2 * plane), _word(0x03030303))
            raised = arith.addi(arith.muli(codes, factors[row]), offsets[row])
            out[column, row] = utils.bitcast(arith.xori(raised, _word(0x80808080)), register.type)
        return mgpu.FragmentedArray(
            _registers=out.reshape(array.registers.shape), _layout=array.layout, _is_signed=True
        )

    # Raising the lower byte by 128, as weights are, flips its first bit.
    return convert_registers(packed, pairs >> 8, (pairs & 0xFF) ^ 0x80)  # pyright: ignore[reportCallIssue]


def unpack_floats(packed: jax.Array, plane: int, offsets: Int32[Array, " rows"]) -> jax.Array:
    """Return `[rows, PLANE]` codes of 4 bits less offsets in bf16, as the left operand of `plgpu.wgmma`.

    Its columns are in `unpacked_order`.

    Args:
      packed: bytes in the layout `WGMMA_8BIT`.
      plane: which codes of a byte.
      offsets: whole numbers from 0 to 127, for each row, in the layout `WGMMA.reduce(1)`.
    """
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA_8BIT, layout.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct(packed.shape, jnp.bfloat16, layout=layout),
    )
    def convert_registers(_, array, offsets):
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        i32 = ir.IntegerType.get_signless(32)
        taken = [utils.bitcast(utils.bitcast(each, i32), pair) for each in offsets.registers.flat]
        # A thread has two rows, which alternate; of each, 4 columns of 16 become two pairs, of 8 columns each.
        registers = array.registers.reshape(-1, 2)
        out = np.empty((len(registers), 2, 2), dtype=object)
        for (tile, row), register in np.ndenumerate(registers):
            for odd in range(2):
                word = arith.andi(_shifted(register, 8 * odd + 4 * plane), _word(0x000F000F))
                raised = utils.bitcast(arith.ori(word, _word(0x43004300)), pair)
                out[tile, odd, row] = arith.subf(raised, taken[row])
        target = layout.to_mgpu()
        registers = out.reshape(target.registers_shape(packed.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=None)

    # 128 + offset twice, in bf16: 128 is 0x4300, and its mantissa counts whole numbers.
    return convert_registers(packed, (offsets + 0x4300) * 0x10001)  # pyright: ignore[reportCallIssue]


def unpacked_order(x: Array) -> Array:
    """Return the columns of x `[t, m]` in the order in which bf16 codes come out of their bytes.

    A register's bytes 0 and 2 are converted together, and so are 1 and 3; `mma.sync` takes two such pairs, columns
    `2i, 2i + 1` and `2i + 8, 2i + 9` of 16, where four consecutive columns lay.
    """
    t, m = x.shape
    return x.reshape(t, m // 16, 4, 2, 2).transpose(0, 1, 4, 2, 3).reshape(t, m)


def _to_bfloat16(registers: np.ndarray, plane: int, bits: int, offset: int) -> np.ndarray:
    # Tiles of 32 columns become two of 16; of those, halves of 16 become wholes.
    source = registers.reshape(PLANE // 32, -1, 2)
    out = np.empty((PLANE // 16, source.shape[1], 2), dtype=object)
    convert = _signed_bytes if bits == 8 else functools.partial(_small, bits=bits, offset=offset)
    for (tile, row, half), register in np.ndenumerate(source):
        for odd in range(2):
            out[2 * tile + half, row, odd] = convert(_shifted(register, 8 * odd + bits * plane))
    return out


def _small(word: ir.Value, bits: int, offset: int) -> ir.Value:
    """Return two codes of less than 7 bits, in the lowest bits of each half: 128 + U, less 128 and the offset."""
    bf16 = ir.BF16Type.get()
    pair = ir.VectorType.get((2,), bf16)
    # The exponent of 128 with U in the last bits of its mantissa.
    raised = arith.ori(arith.andi(word, _word(0x00010001 * (2**bits - 1))), _word(0x43004300))
    return arith.subf(utils.bitcast(raised, pair), vector.broadcast(pair, utils.c(128.0 + offset, bf16)))


def _signed_bytes(word: ir.Value) -> ir.Value:
    """Return two codes of 8 bits less 128.

    The mantissa of 128 has room for seven bits; where the top bit is 0, 256 is subtracted in place of 128.
    """
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    raised = arith.ori(arith.andi(word, _word(0x007F007F)), _word(0x43004300))
    # 128 and 256 differ in the lowest bit of the exponent, which lies where the top bit of a code does.
    taken = arith.xori(arith.andi(word, _word(0x00800080)), _word(0x43804380))
    return arith.subf(utils.bitcast(raised, pair), utils.bitcast(taken, pair))


def _shifted(register: ir.Value, bits: int) -> ir.Value:
    word = utils.bitcast(register, ir.IntegerType.get_signless(32))
    return arith.shrui(word, _word(bits)) if bits else word


def _word(value: int) -> ir.Value:
    return utils.c(value, ir.IntegerType.get_signless(32))
