"""Codes of turned tokens, and the sums of them that products need (Pallas Mosaic GPU).

Smallest and largest number, codes and sums are all tokens' before the threads of a block wait for each other.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.core.packing import TILE
from twla_jax.ops.hopper import threads as threads
from twla_jax.ops.hopper.threads import Real, Word
from twla_jax.ops.rotate_quantize.gpu_token import WGMMA_ROWS, Shape, load_reals, place, tree
from twla_jax.ops.ternary_matmul.gpu_products import Columns, Flat, write_table
from twla_jax.ops.tokens import FINER


@dataclasses.dataclass(frozen=True)
class Plain:
    """Codes in their order, where rows of r begin so far apart that a warp's bytes lie in different banks."""

    r: int
    regular = True

    @property
    def stride(self) -> int:
        """Bytes from a row to the next one: of a warp's four rows, every other one, 8 bytes each."""
        return self.r + (4 - self.r) % 64

    def token(self, codes: ir.Value, index: int) -> Word:
        """The address of a token in `[tokens, bytes]`."""
        return threads.address(codes) + index * threads.shape(codes)[1]

    def place(self, index: Word) -> Word:
        """Where a code's byte is."""
        return index // self.r * self.stride + index % self.r

    def offset(self, row: int, column: int) -> int:
        """Bytes from a code to that so many rows and columns on."""
        return row * self.stride + column


def quantize(
    z: list[jax.Array], settings, codes_smem, table_smem, warps_smem, *, shape: Shape, lie: Flat | Plain
) -> jax.Array:
    """Returns scale and zero point of every row of codes, which go to shared memory. Waits for the block.

    So do, for products, zeros after them and their sums; where they lie `Plain`, `table_smem` is None. Where the shape
    is `wide`, a token's second row of codes has what the first one's rounding left, 254 times finer: together 16 bits.
    All first rows come before all second ones.
    """
    t = shape.tokens
    refs = [codes_smem, warps_smem, *([table_smem] if isinstance(lie, Flat) else [])]

    @threads.on_threads(
        arg_types=(
            *[plgpu.Layout.WGMMA] * t,
            *[plgpu.Layout.WG_SPLAT] * 2,
            threads.per_thread(3),
            *[plgpu.RefType()] * len(refs),
        ),
        return_type=threads.values(2 * shape.codes, jnp.float32),
    )
    def write(_, *arguments):
        z, (line, share, settings, codes, warps, *tables) = arguments[:t], arguments[t:]
        line, share = threads.splat_word(line), threads.splat_word(share)
        parts = [_pairs(each, line, share, shape, lie) for each in z]
        me, at = threads.thread(), threads.address(warps)
        ends = [_ends(pairs) for pairs in parts]
        with threads.when((me & (threads.WARP - 1)).equals(0)):
            for i, pair in enumerate(ends):
                threads.store(at + (me // threads.WARP) * 8, *pair, offset=8 * shape.warps * i)
        levels, clip, half = threads.reals(settings)
        threads.barrier(shape.threads)
        # Not before: codes may take the place of tokens, which other warpgroups turn until they come here.
        if isinstance(lie, Flat):
            _write_zeros(codes, tables[0], shape, lie)
        # A token's by a lane, so that divisions are all tokens' at once.
        mine = (me % Columns(t).width).least(t - 1) if t > 1 else threads.word(0)
        both = load_reals(at + mine * (8 * shape.warps), 2 * shape.warps)
        low, high = clip * tree(both[::2], Real.least), clip * tree(both[1::2], Real.most)
        scale = ((high - low) / levels).most(1e-8)
        zero_point = threads.nearest(threads.real(0.0) - low / scale)
        ends = scale, zero_point, threads.real(1.0) / scale
        of_tokens = [[threads.of_lane(each, i) for each in ends] for i in range(t)] if t > 1 else [ends]
        last = threads.real(threads.WHOLE) - half
        for i, ((scale, zero_point, inverse), pairs) in enumerate(zip(of_tokens, parts, strict=True)):
            origin, start = zero_point - threads.WHOLE, lie.token(codes, i)
            second = lie.token(codes, t + i) if shape.wide else start
            for pair in pairs:
                for k, value in enumerate(threads.unpack_bfloat16(pair.values)):
                    # Ends are bf16 numbers, too, so that many lie half way between two codes: the quotient is
                    # rounded as a division's, by what the first one leaves (Markstein 1990).
                    quotient = value * inverse
                    rest = (quotient * -1.0).times_plus(scale, value)
                    quotient = rest.times_plus(inverse, quotient)
                    # Among numbers as large as WHOLE, sums are rounded to whole ones, whose lowest byte is the code's.
                    code = (quotient + threads.WHOLE + origin).most(0.0).least(levels)
                    where = {
                        "offset": pair.offsets[k],
                        "condition": None if pair.real is None else pair.real[k],
                    }
                    threads.store_byte(start + pair.places[k], (code + last).word(), **where)
                    if shape.wide:
                        rest = ((code - zero_point) * -1.0).times_plus(scale, value)
                        fine = (rest * (inverse * FINER)).most(-FINER / 2).least(FINER / 2) + threads.WHOLE
                        threads.store_byte(second + pair.places[k], fine.word(), **where)
        threads.barrier(shape.threads)
        if isinstance(lie, Flat):
            write_table(codes, tables[0], lie, shape.threads)
            threads.barrier(shape.threads)
        found = [each for scale, zero, _ in of_tokens for each in (scale, zero - half)]
        if shape.wide:
            for scale, _, _ in of_tokens:
                found += [scale / FINER, threads.real(0.0)]
        return threads.as_array(found)

    return write(*z, *place(shape), settings, *refs)


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


def _pairs(z, line: Word, share: Word, shape: Shape, lie: Flat | Plain) -> list[_Pair]:
    """A thread's numbers of its warpgroup's part of a token's `Zᵀ`."""
    width = shape.rows // shape.shares
    lane, warp = threads.thread() & (threads.WARP - 1), (threads.thread() // threads.WARP) & 3
    first_column, first_row = line * WGMMA_ROWS + warp * 16 + lane // 4, share * width + (lane & 3) * 2
    start = lie.place(first_row * shape.r + first_column)
    out = []
    # Rows next to each other, in one column and then eight columns on, which are two words.
    for i, values in enumerate(threads.bfloat16_pairs(z)):
        row, column = i // 2 * 8, i % 2 * 8
        if lie.regular:
            places, offsets = [start, start], [lie.offset(row + each, column) for each in range(2)]
        else:
            first = (first_row + row) * shape.r + first_column + column
            places, offsets = [lie.place(first), lie.place(first + shape.r)], [0, 0]
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
            for token in range(shape.codes):
                at = flat.token(codes, token) + flat.place(index + shape.size * shape.r)
                threads.store(at, threads.word(0))
