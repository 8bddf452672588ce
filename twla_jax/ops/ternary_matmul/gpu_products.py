"""Multiplies tiles of two-bit codes by one to sixteen tokens, on `mma.sync`, thread by thread (Mosaic GPU).

The eight columns of a product are four planes' codes of two tokens, two planes' of four, or one's of eight. Each plane
of a tile is masked where it lies in its bytes, `4ᵖ` times too large, and multiplied with all columns; of these products
a thread keeps the one whose plane its columns have. So the sums of a tile's four groups stay separate until they are
scaled, and add up in whole numbers of a row's steps. A single token's second columns repeat the first; more than eight
tokens take two rounds of products.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.core.packing import PLANE, TILE
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Word
from twla_jax.ops.ternary_matmul.gpu_layout import COLUMNS, HALVES, PER_THREAD, Columns, Flat
from twla_jax.ops.ternary_matmul.gpu_rows import (
    PLANES,
    SWIZZLED,
    RowLane,
    Rows,
    add_paired,
    load_pair,
    plane_of,
)


def initial_sums(rows: Rows, tokens: int, grouped: bool) -> jax.Array:
    """Return zero sums: for every unit of a warp, those of a row and of the row eight below it.

    If a row has one pair of scales, they are sums of plain products, as much too large as those of the first plane, and
    sums of codes come after them.
    """
    columns = Columns(tokens)
    count = columns.of_unit * rows.of_warp + (0 if grouped else columns.rounds * columns.used)

    @threads.on_threads(return_type=threads.values(count, jnp.int32))
    def nothing(_):
        return threads.as_array([threads.word(0)] * count)

    return nothing()


def add_tile(
    sums, codes_smem, scales_smem, token_smem, table_smem, place, tile, *, rows: Rows, flat: Flat
) -> jax.Array:
    """Return the sums with a tile's products added.

    Args:
      sums: as `initial_sums` makes them.
      codes_smem: `[tiles, rows, PLANE]` bytes of a copy.
      scales_smem: `[matrices, tiles, PLANES, rows.scales]` int16, their pairs (α, μ); None if a row has but one.
      token_smem: `[tokens, bytes]`, tokens' codes of all tiles, laid out as `flat` says.
      table_smem: `[tiles + 1, numbers]` int32: see `write_table`.
      place: of the tile in its copy.
      tile: its number among all tiles.
      rows: the rows of a block.
      flat: the layout of the codes.
    """
    count, grouped = sums.shape[0] // 128, scales_smem is not None
    refs = [plgpu.RefType(SWIZZLED), *[plgpu.RefType()] * (3 if grouped else 2)]
    columns = Columns(token_smem.shape[0])

    @threads.on_threads(
        arg_types=(threads.per_thread(count), *[plgpu.Layout.WG_SPLAT] * 2, *refs),
        return_type=threads.values(count, jnp.int32),
    )
    def add(_, sums, place, tile, codes, tokens, table, *scales):
        y, me = list(threads.words(sums)), RowLane(rows)
        place, tile = threads.splat_word(place), threads.splat_word(tile)
        at_codes = threads.address(codes) + place * (rows.count * PLANE)
        rounds, products = range(columns.rounds), range(columns.products)
        operands = [_load_tokens(me, tokens, tile, flat, columns, round_index) for round_index in rounds]
        of_codes = [_load_sums(me, table, tile, columns, round_index) for round_index in rounds]
        if scales:
            of_codes = [[[each & 0xFFFF for each in found] for found in of_round] for of_round in of_codes]
        else:
            first = columns.of_unit * rows.of_warp
            for round_index, product, other in itertools.product(rounds, products, range(columns.used)):
                at = first + round_index * columns.used + other
                y[at] = y[at] + of_codes[round_index][product][other]
        factors = [threads.word(1 << (16 - columns.more(k))) >> columns.shift(me) for k in products]
        kinds = list(itertools.product(products, range(HALVES)))
        for i in range(rows.of_warp):
            packed = me.codes(at_codes, i)
            # Load before the products: after them, these loads would wait.
            pairs = [
                load_pair(me, scales[0], place, i, half, product * columns.at_once, columns.plane(me))
                for product, half in kinds
                if scales
            ]
            for round_index in rounds:
                found = [_multiply(packed, operands[round_index][k], k, columns, me) for k in products]
                for j, (product, half) in enumerate(kinds):
                    for other in range(columns.used):
                        at = columns.place(i, round_index, half, other)
                        value, q = (
                            found[product][half * PER_THREAD + other],
                            of_codes[round_index][product][other],
                        )
                        if pairs:
                            y[at] = add_paired(value, factors[product], q, pairs[j], y[at])
                        else:
                            y[at] = y[at] + (value >> columns.more(product))
        return threads.as_array(y)

    operands = [codes_smem, token_smem, table_smem, *([scales_smem] if grouped else [])]
    return add(sums, place, tile, *operands)


def _load_sums(
    me: RowLane, table: ir.Value, tile: Word, columns: Columns, round_index: int
) -> list[list[Word]]:
    """Return what μ of a thread's columns is multiplied by, for each product of a round."""
    at = threads.address(table) + tile * (4 * columns.numbers)
    if me.rows.shares > 1:
        at = threads.select(me.share.equals(0), at, _zeros(table))
    at = at + me.pair * (4 * PER_THREAD)
    first = round_index * columns.products
    return [threads.load(at, columns.used, offset=4 * COLUMNS * (first + k)) for k in range(columns.products)]


def _load_tokens(
    me: RowLane, tokens: ir.Value, tile: Word, flat: Flat, columns: Columns, round_index: int
) -> list[list[Word]]:
    """Return the right operands of a warp's share of the columns, for each product of a round."""
    # A missing token gets the last one's codes; its sums are never read.
    token = (me.group % columns.width + round_index * COLUMNS).least(columns.tokens - 1)
    at = threads.address(tokens) + token * threads.shape(tokens)[1]
    at = at + tile * flat.size(TILE) + (me.group // columns.width) * flat.size(PLANE)
    at = at + me.share * flat.size(PLANE // 2) + (me.lane & 3) * 16
    halves = range(2 // me.rows.shares)
    return [
        [
            each
            for half in halves
            for each in threads.load(
                at, 4, offset=flat.size(product * columns.at_once * PLANE) + flat.size(half * PLANE // 2)
            )
        ]
        for product in range(columns.products)
    ]


def _multiply(
    packed: list[list[Word]], tokens: list[Word], product: int, columns: Columns, me: RowLane
) -> list[Word]:
    """Return a thread's sums of a warp's unit over its share of a tile's columns: two rows, two columns each."""
    found, first = [], product * columns.at_once
    for plane in range(first, first + columns.at_once):
        sums = [threads.word(0)] * (HALVES * PER_THREAD)
        for j, each in enumerate(packed):
            sums = threads.multiply_bytes(plane_of(each, plane), tokens[2 * j : 2 * j + 2], sums)
        found.append(sums)
    mine, chosen = columns.plane(me), found[-1]
    for plane, sums in enumerate(found[:-1]):
        chosen = [threads.select(mine.equals(plane), *both) for both in zip(sums, chosen, strict=True)]
    return chosen


def write_table(codes: ir.Value, table: ir.Value, flat: Flat, count: int) -> None:
    """Write every tile's sums of tokens' codes; after the last, zeros.

    The sum of plane p and token i is number `width · p + i`; those of the second round come after the first one's.
    `count` threads share the work; the caller waits for them.
    """
    me, first = threads.thread(), threads.address(table)
    tokens, tiles = threads.shape(codes)[0], threads.shape(table)[0] - 1
    columns = Columns(tokens)
    chunks = tiles * TILE // 16
    for i in range(-(-chunks // count)):
        chunk = me + i * count
        place = flat.chunk(chunk.least(chunks - 1) * 16)
        totals = []
        for token in range(tokens):
            total = threads.word(0)
            for each in threads.load(flat.token(codes, token) + place, 4):
                total = threads.sum_of_bytes(each, total)
            for distance in (1, 2, 4):
                total = total + threads.shuffle(total, distance)
            totals.append(total)
        group = chunk // 8
        with threads.when(threads.both((chunk & 7).equals(0), chunk < chunks)):
            at = first + (group // PLANES) * (4 * columns.numbers) + (group & 3) * (4 * columns.width)
            for token, total in enumerate(totals):
                threads.store(at, total, offset=4 * columns.number(token))
    with threads.when(me < columns.numbers):
        threads.store(_zeros(table) + me * 4, threads.word(0))


def write_sums(sums, partials_smem, scales_gmem, first_row, *, rows: Rows, matrix_rows: int) -> None:
    """Write a warpgroup's sums, planes added up, to `partials_smem` `[shares, tokens, rows]` float32.

    Where a row has one pair (α, μ), `scales_gmem` `[1, 2, all rows]` has it, and the block's rows are `first_row` and
    on of each matrix, which has `matrix_rows`; elsewhere it is None.
    """
    refs = [plgpu.RefType()] * (1 + (scales_gmem is not None))
    t = partials_smem.shape[1]
    columns = Columns(t)

    @threads.on_threads(arg_types=(threads.per_thread(sums.shape[0] // 128), plgpu.Layout.WG_SPLAT, *refs))
    def write(_, sums, first_row, partials, scales=None):
        values, me = threads.words(sums), RowLane(rows)
        first, plane = threads.splat_word(first_row), columns.plane(me)

        def total(value: Word) -> Word:
            for distance in (1, 2):
                if distance * PER_THREAD >= columns.width:
                    value = value + threads.shuffle(value, distance)
            return value

        of_codes = [
            total(values[columns.of_unit * rows.of_warp + other])
            for other in range(columns.rounds * columns.used)
            if scales is not None
        ]
        for i in range(rows.of_warp):
            for half in range(HALVES):
                row, token = me.row(i, half), columns.first_token(me)
                pair = []
                if scales is not None:
                    n = threads.shape(scales)[-1]
                    of_first = (
                        threads.word(0)
                        if rows.matrices == 1
                        else row // rows.each * (matrix_rows - rows.each)
                    )
                    at = (first + row + of_first).least(n - 1)
                    pair = [threads.load_real(scales, at + kind * n) for kind in range(2)]
                for round_index, other in itertools.product(range(columns.rounds), range(columns.used)):
                    at = columns.place(i, round_index, half, other)
                    acc = total(values[at] >> columns.shift(me) if pair else values[at])
                    value = acc.converted()
                    if pair:  # α and μ belong to T, but U was multiplied
                        q = of_codes[round_index * columns.used + other]
                        value = q.converted().times_plus(pair[1], (acc - q).converted() * pair[0])
                    mine = token + (round_index * COLUMNS + other)
                    with threads.when(threads.both(plane.equals(0), mine < t, row < rows.count)):
                        at = (me.share * t + mine) * rows.count + row
                        threads.store(threads.address(partials) + at * 4, value)

    operands = [partials_smem] + ([] if scales_gmem is None else [scales_gmem])
    write(sums, first_row, *operands)


def _zeros(table: ir.Value) -> Word:
    """Return the address of the table's last row."""
    rows, columns = threads.shape(table)
    return threads.address(table) + (rows - 1) * 4 * columns
