"""Codes of turned tokens, and the sums of them that products need (Pallas Mosaic GPU).

Smallest and largest number, codes and sums are all tokens' before the threads of a block wait for each other.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.gpu_threads import Real, Word
from twla_jax.ops.quantized_linear.gpu_token import WGMMA_ROWS, Shape, load_reals, place, tree
from twla_jax.ops.ternary_matmul.gpu_products import Columns, Flat, write_table
from twla_jax.packing import TILE


def quantize(z: list[jax.Array], settings, codes_smem, table_smem, warps_smem, *, shape: Shape) -> jax.Array:
    """Scale and zero point of every token, whose codes and sums go to shared memory. Waits for the block."""
    t, flat = shape.tokens, Flat(shape.r)

    @threads.on_threads(
        arg_types=(
            *[plgpu.Layout.WGMMA] * t,
            *[plgpu.Layout.WG_SPLAT] * 2,
            threads.per_thread(3),
            *[plgpu.RefType()] * 3,
        ),
        return_type=threads.values(2 * t, jnp.float32),
    )
    def write(_, *arguments):
        z, (line, share, settings, codes, table, warps) = arguments[:t], arguments[t:]
        parts = [_pairs(each, threads.splat_word(line), threads.splat_word(share), shape) for each in z]
        me, at = threads.thread(), threads.address(warps)
        ends = [_ends(pairs) for pairs in parts]
        with threads.when((me & (threads.WARP - 1)).equals(0)):
            for i, pair in enumerate(ends):
                threads.store(at + (me // threads.WARP) * 8, *pair, offset=8 * shape.warps * i)
        levels, clip, half = threads.reals(settings)
        threads.barrier(shape.threads)
        # Not before: codes may take the place of tokens, which other warpgroups turn until they come here.
        _write_zeros(codes, table, shape, flat)
        # A token's by a lane, so that divisions are all tokens' at once.
        mine = (me % Columns(t).width).least(t - 1) if t > 1 else threads.word(0)
        both = load_reals(at + mine * (8 * shape.warps), 2 * shape.warps)
        low, high = clip * tree(both[::2], Real.least), clip * tree(both[1::2], Real.most)
        scale = ((high - low) / levels).most(1e-8)
        zero_point = threads.nearest(threads.real(0.0) - low / scale)
        ends = scale, zero_point, threads.real(1.0) / scale
        of_tokens = [[threads.of_lane(each, i) for each in ends] for i in range(t)] if t > 1 else [ends]
        last = threads.real(threads.WHOLE) - half
        for i, ((_, zero_point, inverse), pairs) in enumerate(zip(of_tokens, parts, strict=True)):
            origin, start = zero_point - threads.WHOLE, flat.token(codes, i)
            for pair in pairs:
                for k, value in enumerate(threads.unpack_bfloat16(pair.values)):
                    # Among numbers as large as WHOLE, sums are rounded to whole ones, whose lowest byte is the code's.
                    code = (value.times_plus(inverse, threads.WHOLE) + origin).most(0.0).least(levels) + last
                    threads.store_byte(
                        start + pair.places[k],
                        code.word(),
                        offset=pair.offsets[k],
                        condition=None if pair.real is None else pair.real[k],
                    )
        threads.barrier(shape.threads)
        write_table(codes, table, flat, shape.threads)
        threads.barrier(shape.threads)
        return threads.as_array([each for scale, zero, _ in of_tokens for each in (scale, zero - half)])

    return write(*z, *place(shape), settings, codes_smem, table_smem, warps_smem)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Numbers of two rows of `Z`, where their codes' bytes go, and whether they are the token's; None if known."""

    values: Word
    places: list[Word]
    offsets: list[int]
    real: list[ir.Value] | None

    def or_else(self, worst: int) -> Word:
        """The numbers, and the bf16 with these bits in place of what is not the token's."""
        if self.real is None:
            return self.values
        first, second = self.real
        worst_second = (self.values & 0xFFFF) + (worst << 16)
        both = threads.select(second, self.values, worst_second)
        return threads.select(first, both, threads.word(worst << 16 | worst))


def _pairs(z, line: Word, share: Word, shape: Shape) -> list[_Pair]:
    """A thread's numbers of its warpgroup's part of a token's `Zᵀ`."""
    flat, width = Flat(shape.r), shape.rows // shape.shares
    lane, warp = threads.thread() & (threads.WARP - 1), (threads.thread() // threads.WARP) & 3
    first_column, first_row = line * WGMMA_ROWS + warp * 16 + lane // 4, share * width + (lane & 3) * 2
    regular = shape.r % flat.run == 0  # then one row begins where another does, so much further
    start = flat.place(first_row * shape.r + first_column)
    out = []
    # Rows next to each other, in one column and then eight columns on, which are two words.
    for i, values in enumerate(threads.bfloat16_pairs(z)):
        row, column = i // 2 * 8, i % 2 * 8
        if regular:
            places = [start, start]
            offsets = [(row + each) * flat.size(shape.r) + column * 4 for each in range(2)]
        else:
            first = (first_row + row) * shape.r + first_column + column
            places, offsets = [flat.place(first), flat.place(first + shape.r)], [0, 0]
        last = (shape.shares - 1) * width + row + 7
        real = None
        if last >= shape.size or shape.columns != shape.r:
            inside = first_column + column < shape.r
            real = [threads.both(first_row + row + each < shape.size, inside) for each in range(2)]
        out.append(_Pair(values, places, offsets, real))
    return out


def _ends(pairs: list[_Pair]) -> list[Real]:
    """The smallest and the largest of a warp's numbers."""
    ends = []
    for infinity, of_words, choose, over_warp in (
        (0x7F80, threads.least_bfloat16, Real.least, threads.warp_least),
        (0xFF80, threads.most_bfloat16, Real.most, threads.warp_most),
    ):
        both = threads.unpack_bfloat16(tree([pair.or_else(infinity) for pair in pairs], of_words))
        ends.append(over_warp(choose(*both)))
    return ends


def _write_zeros(codes: ir.Value, table: ir.Value, shape: Shape, flat: Flat) -> None:
    """Codes past each token's last, up to the end of a tile."""
    last = (threads.shape(table)[0] - 1) * TILE
    count = last - shape.size * shape.r
    me = threads.thread()
    for i in range(-(-count // (4 * shape.threads))):
        index = (me + i * shape.threads) * 4
        with threads.when(index < count):
            for token in range(shape.tokens):
                at = flat.token(codes, token) + flat.place(index + shape.size * shape.r)
                threads.store(at, threads.word(0))
