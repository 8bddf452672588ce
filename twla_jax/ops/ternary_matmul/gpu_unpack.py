"""Two-bit codes to the operands of `mma.sync`, register by register.

Mosaic GPU has no shifts on 8-bit vectors, so this is written against its registers: each holds four consecutive bytes
of one weight row, whose plane i is `(w >> 2i) & 0x03030303`.
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

from twla_jax.packing import PLANE


def unpack(packed: jax.Array, plane: int, rows: int, dtype) -> jax.Array:
    """`[rows, PLANE]` codes U in int8 or bf16, as the left operand of `plgpu.mma`; bf16 in `unpacked_order`.

    Args:
      packed: bytes in the layout `MMA_LHS(int8)`.
    """
    layout = plgpu.Layout.MMA_LHS(dtype)
    convert = _to_int8 if dtype == jnp.int8 else _to_bfloat16

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.MMA_LHS(jnp.int8),),
        return_type=plgpu.ShapeDtypeStruct((rows, PLANE), dtype, layout=layout),
    )
    def convert_registers(_, array):
        registers = convert(array.registers, plane)
        target = layout.to_mgpu()
        return mgpu.FragmentedArray(
            _registers=registers.reshape(target.registers_shape((rows, PLANE))),
            _layout=target,
            _is_signed=True if dtype == jnp.int8 else None,
        )

    return convert_registers(packed)  # pyright: ignore[reportCallIssue]


def unpacked_order(x: Array) -> Array:
    """Columns of x `[t, m]` in the order in which bf16 codes come out of their bytes.

    A register's bytes 0 and 2 are converted together, and so are 1 and 3; `mma.sync` takes two such pairs, columns
    `2i, 2i + 1` and `2i + 8, 2i + 9` of 16, where four consecutive columns lay.
    """
    t, m = x.shape
    return x.reshape(t, m // 16, 4, 2, 2).transpose(0, 1, 4, 2, 3).reshape(t, m)


def _to_int8(registers: np.ndarray, plane: int) -> np.ndarray:
    out = np.empty_like(registers)
    for index, register in np.ndenumerate(registers):
        word = _shifted(register, 2 * plane)
        out[index] = utils.bitcast(arith.andi(word, _word(0x03030303)), register.type)
    return out


def _to_bfloat16(registers: np.ndarray, plane: int) -> np.ndarray:
    # Halves of 16 columns of a tile of 32 become tiles themselves, of two halves of 8, each with two halves of rows.
    source = registers.reshape(-1, PLANE // 32, 2, 2)
    out = np.empty((len(source), PLANE // 16, 2, 2), dtype=object)
    bf16 = ir.BF16Type.get()
    pair = ir.VectorType.get((2,), bf16)
    offset = vector.broadcast(pair, utils.c(128.0, bf16))
    for (rows, tile, half, row), register in np.ndenumerate(source):
        for odd in range(2):
            bits = arith.andi(_shifted(register, 8 * odd + 2 * plane), _word(0x00030003))
            # 128 + U: the exponent of 128 with U in the last bits of its mantissa.
            value = utils.bitcast(arith.ori(bits, _word(0x43004300)), pair)
            out[rows, 2 * tile + half, odd, row] = arith.subf(value, offset)
    return out


def _shifted(register: ir.Value, bits: int) -> ir.Value:
    word = utils.bitcast(register, ir.IntegerType.get_signless(32))
    return arith.shrui(word, _word(bits)) if bits else word


def _word(value: int) -> ir.Value:
    return utils.c(value, ir.IntegerType.get_signless(32))
