"""Quantises rotated tokens, and adds up the codes that products need the sums of (Pallas Mosaic GPU).

The threads of a block wait for each other once for all tokens: for their ranges, their codes and their sums.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.core.packing import TILE
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.limits import WGMMA_ROWS
from twla_jax.ops.hopper.threads import Real, Word
from twla_jax.ops.rotate_quantize.gpu_rotation import (
    TokenShape,
    load_reals,
    tree,
    warpgroup_share,
)
from twla_jax.ops.ternary_matmul.gpu_layout import Columns, Flat
from twla_jax.ops.ternary_matmul.gpu_products import write_table
from twla_jax.ops.tokens import FINER


@dataclasses.dataclass(frozen=True)
class Plain:
    """Lays codes out in their order; rows of r begin so far apart that a warp's bytes lie in different banks."""

    r: int
    regular = True

    @property
    def stride(self) -> int:
        """Return the bytes from a row to the next one: of a warp's four rows, every other one, 8 bytes each."""
        return self.r + (4 - self.r) % 64

    def token(self, codes: ir.Value, index: int) -> Word:
        """Return the address of a token in `[tokens, bytes]`."""
        return threads.address(codes) + index * threads.shape(codes)[1]

    def place(self, index: Word) -> Word:
        """Return where a code's byte is."""
        return index // self.r * self.stride + index % self.r

    def offset(self, row: int, column: int) -> int:
        """Return the bytes from a code to that `row` rows and `column` columns on."""
        return row * self.stride + column


def quantize(
    z: list[jax.Array], settings, codes_smem, table_smem, warps_smem, *, shape: TokenShape, lie: Flat | Plain
) -> jax.Array:
    """Return the scale and zero point of every token, and write its codes to shared memory. Waits for the block.

    For products, write also zeros after the codes and their sums; in the layout `Plain`, `table_smem` is None.
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
        token_pairs = [_pairs(each, line, share, shape, lie) for each in z]
        me, at = threads.thread(), threads.address(warps)
        ends = [_ends(pairs) for pairs in token_pairs]
        with threads.when((me & (threads.WARP - 1)).equals(0)):
            for i, pair in enumerate(ends):
                threads.store(at + (me // threads.WARP) * 8, *pair, offset=8 * shape.warps * i)
        levels, clip, half = threads.reals(settings)
        threads.barrier(shape.threads)
        # Not earlier: codes may overwrite tokens, which other warpgroups rotate until they arrive here.
        if isinstance(lie, Flat):
            _write_zeros(codes, tables[0], shape, lie)
        # Each lane divides for one token, so that all tokens' divisions take the time of one.
        mine = (me % Columns(t).width).least(t - 1) if t > 1 else threads.word(0)
        both = load_reals(at + mine * (8 * shape.warps), 2 * shape.warps)
        low, high = clip * tree(both[::2], Real.least), clip * tree(both[1::2], Real.most)
        scale = ((high - low) / levels).most(1e-8)
        zero_point = threads.nearest(threads.real(0.0) - low / scale)
        ends = scale, zero_point, threads.real(1.0) / scale
        of_tokens = [[threads.of_lane(each, i) for each in ends] for i in range(t)] if t > 1 else [ends]
        last = threads.real(threads.WHOLE) - half
        for i, ((scale, zero_point, inverse), pairs) in enumerate(zip(of_tokens, token_pairs, strict=True)):
            origin, start = zero_point - threads.WHOLE, lie.token(codes, i)
            second = lie.token(codes, t + i) if shape.wide else start
            for pair in pairs:
                for k, value in enumerate(threads.unpack_bfloat16(pair.values)):
                    # Ends of the range are bf16 numbers, so many lie half way between two codes: the quotient is
                    # rounded as a division's, by the remainder of the first one (Markstein 1990).
                    quotient = value * inverse
                    rest = (quotient * -1.0).times_plus(scale, value)
                    quotient = rest.times_plus(inverse, quotient)
                    # Adding WHOLE rounds to a whole number, whose lowest byte is the code's.
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

    return write(*z, *warpgroup_share(shape), settings, *refs)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Holds two rows' numbers of `Z`, where their codes go, and whether they belong to the token; None if they do."""

    values: Word
    places: list[Word]
    offsets: list[int]
    real: list[ir.Value] | None

    def or_else(self, worst: int) -> Word:
        """Return the numbers, with the bf16 of bits `worst` in place of what does not belong to the token."""
        if self.real is None:
            return self.values
        first, second = self.real
        worst_second = (self.values & 0xFFFF) + (worst << 16)
        both = threads.select(second, self.values, worst_second)
        return threads.select(first, both, threads.word(worst << 16 | worst))


def _pairs(z, line: Word, share: Word, shape: TokenShape, lie: Flat | Plain) -> list[_Pair]:
    """Return a thread's numbers of its warpgroup's share of a token's `Zᵀ`."""
    width = shape.rows // shape.shares
    lane, warp = threads.thread() & (threads.WARP - 1), (threads.thread() // threads.WARP) & 3
    first_column, first_row = line * WGMMA_ROWS + warp * 16 + lane // 4, share * width + (lane & 3) * 2
    start = lie.place(first_row * shape.r + first_column)
    out = []
    # Two neighbouring rows, in one column and then eight columns on: two words.
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
    """Return the smallest and the largest of a warp's numbers."""
    ends = []
    for infinity, of_words, choose, over_warp in (
        (0x7F80, threads.least_bfloat16, Real.least, threads.warp_least),
        (0xFF80, threads.most_bfloat16, Real.most, threads.warp_most),
    ):
        both = threads.unpack_bfloat16(tree([pair.or_else(infinity) for pair in pairs], of_words))
        ends.append(over_warp(choose(*both)))
    return ends


def _write_zeros(codes: ir.Value, table: ir.Value, shape: TokenShape, flat: Flat) -> None:
    """Write zero codes past each token's last, up to the end of a tile."""
    last = (threads.shape(table)[0] - 1) * TILE
    count = last - shape.size * shape.r
    me = threads.thread()
    for i in range(-(-count // (4 * shape.threads))):
        index = (me + i * shape.threads) * 4
        with threads.when(index < count):
            for token in range(shape.codes):
                at = flat.token(codes, token) + flat.place(index + shape.size * shape.r)
                threads.store(at, threads.word(0))
