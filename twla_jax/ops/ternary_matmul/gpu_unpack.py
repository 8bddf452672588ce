"""Codes of two or four bits to the operands of the tensor cores, register by register.

Mosaic GPU has no shifts on 8-bit vectors, so this is written against its registers: each holds four consecutive bytes
of one weight row, whose plane i is `(w >> 2i) & 0x03030303`, or `(w >> 4i) & 0x0f0f0f0f` for four-bit codes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Array


def unpack(packed: jax.Array, plane: int, planes: int, dtype, *, wide: bool = False) -> jax.Array:
    """`[rows, PLANE]` codes U in int8 or bf16, as a left operand; bf16 in `unpacked_order`.

    Args:
      packed: bytes in `operand_layout(int8, wide)`.
      plane: which of the `planes` in a byte.
      wide: for `plgpu.wgmma` and not `plgpu.mma`.
    """
    layout = operand_layout(dtype, wide)

    @plgpu.inline_mgpu(
        arg_types=(operand_layout(jnp.int8, wide),),
        return_type=plgpu.ShapeDtypeStruct(packed.shape, dtype, layout=layout),
    )
    def convert_registers(_, array):
        convert = _to_int8 if dtype == jnp.int8 else _to_bfloat16
        registers = convert(array.registers, plane * 8 // planes, 2 ** (8 // planes) - 1)
        target = layout.to_mgpu()
        return mgpu.FragmentedArray(
            _registers=registers.reshape(target.registers_shape(packed.shape)),
            _layout=target,
            _is_signed=True if dtype == jnp.int8 else None,
        )

    return convert_registers(packed)  # pyright: ignore[reportCallIssue]


def operand_layout(dtype, wide: bool):
    """Registers of the left operand of `plgpu.wgmma` if wide, else of `plgpu.mma`."""
    if not wide:
        return plgpu.Layout.MMA_LHS(dtype)
    return plgpu.Layout.WGMMA_8BIT if dtype == jnp.int8 else plgpu.Layout.WGMMA


def unpacked_order(x: Array) -> Array:
    """Columns of x `[t, m]` in the order in which bf16 codes come out of their bytes.

    A register's bytes 0 and 2 are converted together, and so are 1 and 3; `mma.sync` takes two such pairs, columns
    `2i, 2i + 1` and `2i + 8, 2i + 9` of 16, where four consecutive columns lay.
    """
    t, m = x.shape
    return x.reshape(t, m // 16, 4, 2, 2).transpose(0, 1, 4, 2, 3).reshape(t, m)


def swizzled(itemsize: int):
    """How an operand of so many bytes a value lies in shared memory: 8 rows by 128 bytes, swizzled."""
    tiling = plgpu.TilingTransform((8, 128 // itemsize))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]


def _to_int8(registers: np.ndarray, shift: int, mask: int) -> np.ndarray:
    out = np.empty_like(registers)
    for index, register in np.ndenumerate(registers):
        word = arith.andi(_shifted(register, shift), _word(0x01010101 * mask))
        out[index] = utils.bitcast(word, register.type)
    return out


def _to_bfloat16(registers: np.ndarray, shift: int, mask: int) -> np.ndarray:
    # Sixteen columns and two rows, 8 apart, of each lane: its columns become twice as many registers, rows innermost.
    source = registers.reshape(-1, 2)
    out = np.empty((len(source), 2, 2), dtype=object)
    bf16 = ir.BF16Type.get()
    pair = ir.VectorType.get((2,), bf16)
    offset = vector.broadcast(pair, utils.c(128.0, bf16))
    for (columns, row), register in np.ndenumerate(source):
        for odd in range(2):
            bits = arith.andi(_shifted(register, 8 * odd + shift), _word(0x00010001 * mask))
            # 128 + U: the exponent of 128 with U in the last bits of its mantissa.
            value = utils.bitcast(arith.ori(bits, _word(0x43004300)), pair)
            out[columns, odd, row] = arith.subf(value, offset)
    return out


def _shifted(register: ir.Value, bits: int) -> ir.Value:
    word = utils.bitcast(register, ir.IntegerType.get_signless(32))
    return arith.shrui(word, _word(bits)) if bits else word


def _word(value: int) -> ir.Value:
    return utils.c(value, ir.IntegerType.get_signless(32))
