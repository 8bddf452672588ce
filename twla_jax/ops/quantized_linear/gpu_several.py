"""Tiles of two-bit codes times two to four tokens, on `mma.sync`, thread by thread (Mosaic GPU).

As in `gpu_products`, a column of the right operand has the codes that meet one plane of a tile, and zeros elsewhere.
Eight columns have four planes of two tokens, or two of four, whose other two planes go to sums of their own: never more
products than a single token takes. What μ is multiplied by needs none: a column begins with `-4ᵖ Σ q`, and is itself
`4ᵖ` times too large.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.gpu_threads import Real, Word
from twla_jax.ops.quantized_linear.gpu_products import COLUMNS, PLANES, Flat, load_token, width, zeros
from twla_jax.ops.ternary_matmul.gpu_rows import SUMS, SWIZZLED, Lane, Rows, plane_of

_OF_ROW = 2  # columns of a thread, which are two tokens'


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Column `width · p + i` of a product has token i and plane p of those planes that it has at once."""

    tokens: int

    @property
    def width(self) -> int:
        """Tokens, filled up."""
        return width(self.tokens)

    @property
    def at_once(self) -> int:
        """Planes of a product."""
        return COLUMNS // self.width

    @property
    def products(self) -> int:
        """For all planes."""
        return PLANES // self.at_once

    def first_token(self, me: Lane) -> Word:
        """Of a thread's two."""
        return (me.pair * _OF_ROW) % self.width

    def plane(self, me: Lane) -> Word:
        """A thread's, of the first product."""
        return (me.pair * _OF_ROW) // self.width


def start(rows: Rows, tokens: int, grouped: bool) -> jax.Array:
    """Sums to begin with: for every unit of a warp and every product, as `gpu_products.start` has them.

    If a row has but one pair of scales, each product's sums of codes come after them, of the thread's two columns.
    """
    of_product = SUMS * rows.of_warp + (0 if grouped else _OF_ROW)
    count = _Columns(tokens).products * of_product

    @threads.on_threads(return_type=threads.values(count, jnp.float32))
    def nothing(_):
        return threads.as_array([threads.real(0.0)] * count)

    return nothing()


def add_tile(
    sums, codes_smem, scales_smem, token_smem, table_smem, tile, *, rows: Rows, flat: Flat
) -> jax.Array:
    """As `gpu_products.add_tile`, for `start`'s sums, tokens one below the other, and `4 · width` numbers a tile."""
    count, grouped = sums.shape[0] // 128, scales_smem is not None
    refs = [plgpu.RefType(SWIZZLED), *[plgpu.RefType()] * (3 if grouped else 2)]
    t = token_smem.shape[0]
    columns = _Columns(t)

    @threads.on_threads(
        arg_types=(threads.per_thread(count), plgpu.Layout.WG_SPLAT, *refs),
        return_type=threads.values(count, jnp.float32),
    )
    def add(_, sums, tile, codes, tokens, table, *scales):
        y, me, tile = list(threads.reals(sums)), Lane(rows), threads.splat_word(tile)
        column = me.lane & (COLUMNS - 1)
        # Of a token that is missing, the last one's codes: nobody reads those sums.
        mine = threads.address(tokens) + (column % columns.width).least(t - 1) * threads.shape(tokens)[1]
        plane, none = column // columns.width, zeros(table)
        operands = load_token(me, mine, plane, none, tile, flat, columns.at_once)
        begin = threads.address(table) + tile * (4 * threads.shape(table)[1])
        if rows.shares > 1:
            begin = threads.select(me.share.equals(0), begin, none)
        begins = [
            threads.load(begin + me.pair * 8, 2, offset=4 * COLUMNS * product)
            for product in range(columns.products)
        ]
        # As many times too large as the products.
        of_codes = [[threads.real(0.0) - each.converted() for each in pair] for pair in begins]
        if not scales:
            at = SUMS * rows.of_warp * columns.products
            for i, value in enumerate(value for pair in of_codes for value in pair):
                y[at + i] = y[at + i] + value
        for i in range(rows.of_warp):
            products = _multiply(me.codes(threads.address(codes), i), operands, begins, columns)
            for k, product in enumerate(products):
                first = SUMS * (i * columns.products + k)
                for half in range(2):
                    pair = _scales(me, threads.address(scales[0]), i, half, k, columns) if scales else None
                    for other in range(_OF_ROW):
                        index = 2 * half + other
                        value, so_far = product[index].converted(), y[first + index]
                        if pair is None:
                            y[first + index] = so_far + value
                        else:
                            alpha, mu = pair
                            so_far = of_codes[k][other].times_plus(mu, so_far)
                            y[first + index] = value.times_plus(alpha, so_far)
        return threads.as_array(y)

    operands = [codes_smem, token_smem, table_smem, *([scales_smem] if grouped else [])]
    return add(sums, tile, *operands)


def _multiply(
    codes: list[list[Word]], tokens: list[list[Word]], begins: list[list[Word]], columns: _Columns
) -> list[list[Word]]:
    """Each product's sums of a warp's unit, four a thread, over its share of a tile's columns."""
    # Two at least that are added up afterwards, as a product waits for the one before that adds to the same.
    chains = max(2, columns.products)
    sums = [[*pair, *pair] for pair in begins]
    sums += [[threads.word(0)] * SUMS] * (chains - columns.products)
    for j, packed in enumerate(codes):
        for plane in range(PLANES):
            chain = plane // columns.at_once if columns.products > 1 else plane % chains
            sums[chain] = threads.multiply_bytes(
                plane_of(packed, plane), tokens[plane][2 * j : 2 * j + 2], sums[chain]
            )
    if columns.products == 1:
        return [[one + other for one, other in zip(*sums, strict=True)]]
    return sums


def _scales(me: Lane, scales: Word, i: int, half: int, product: int, columns: _Columns) -> tuple[Real, Real]:
    """(α, μ) of a row of a warp's unit i, in the plane that a thread's columns of a product have."""
    plane = columns.plane(me) + product * columns.at_once
    at = scales + (me.scale(i, half) + plane * me.rows.each) * 2
    return threads.load_half(at), threads.load_half(at + 2 * PLANES * me.rows.each)


def write_sums(sums, parts_smem, scales_gmem, first_row, *, rows: Rows) -> None:
    """A warpgroup's sums, planes added up, into `parts_smem` `[shares, tokens, rows]` float32.

    Where a row has one pair (α, μ), `scales_gmem` `[1, 2, all rows]` has it, and the row is `first_row` and more;
    None elsewhere.
    """
    refs = [plgpu.RefType()] * (1 + (scales_gmem is not None))
    t = parts_smem.shape[1]
    columns = _Columns(t)

    @threads.on_threads(arg_types=(threads.per_thread(sums.shape[0] // 128), plgpu.Layout.WG_SPLAT, *refs))
    def write(_, sums, first_row, parts, scales=None):
        values, me = threads.reals(sums), Lane(rows)
        first, plane = threads.splat_word(first_row), columns.plane(me)
        weights = []
        for product in range(columns.products):
            weight = threads.real(4.0 ** -(product * columns.at_once))
            for i in range(1, columns.at_once):
                smaller = threads.real(4.0 ** -(product * columns.at_once + i))
                weight = threads.select(plane.equals(i), smaller, weight)
            weights.append(weight)

        def total(at: int, stride: int) -> Real:
            found = values[at] * weights[0]
            for product in range(1, columns.products):
                found = values[at + stride * product].times_plus(weights[product], found)
            return found

        for i in range(rows.of_warp):
            for half in range(2):
                row, token = me.row(i, half), columns.first_token(me)
                pair = None
                if scales is not None:
                    n = threads.shape(scales)[-1]
                    at = (first + row.least(rows.count - 1)).least(n - 1)
                    pair = [threads.load_real(scales, at + kind * n) for kind in range(2)]
                for other in range(_OF_ROW):
                    value = total(SUMS * columns.products * i + 2 * half + other, SUMS)
                    if pair is not None:
                        of_codes = total(SUMS * columns.products * rows.of_warp + other, _OF_ROW)
                        value = of_codes.times_plus(pair[1], value * pair[0])
                    for distance in (1, 2):
                        if distance * _OF_ROW >= columns.width:
                            value = value + threads.shuffle(value, distance)
                    writes = threads.both(plane.equals(0), token + other < t, row < rows.count)
                    with threads.when(writes):
                        at = (me.share * t + token + other) * rows.count + row
                        threads.store(threads.address(parts) + at * 4, value)

    operands = [parts_smem] + ([] if scales_gmem is None else [scales_gmem])
    write(sums, first_row, *operands)
