"""Tiles of two-bit codes times one to four tokens, on `mma.sync`, thread by thread (Mosaic GPU).

A product's eight columns are four planes' codes of two tokens, or two planes' of four. Each plane of a tile is masked
where it lies in its bytes, `4ᵖ` times too large, and multiplied with all columns; of these products a thread keeps that
whose plane is its columns'. So the sums of a tile's four groups come out apart, next to each other, as they meet their
scales. A single token's second columns are the first ones again.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.gpu_threads import Real, Word
from twla_jax.ops.ternary_matmul.gpu_rows import SWIZZLED, Lane, Rows, plane_of
from twla_jax.packing import PLANE, TILE

COLUMNS = 8  # of `mma.sync`
PLANES = 4
_PER_THREAD = 2  # columns of a product that a thread has, neighbours; of two rows
_HALVES = 2  # of a unit's rows, of which a thread has one each


@dataclasses.dataclass(frozen=True)
class Columns:
    """Column `width · p + i` of a product has token i and plane p of those planes that it has at once."""

    tokens: int

    @property
    def width(self) -> int:
        """Tokens, filled up to a power of two."""
        return max(1 << (self.tokens - 1).bit_length(), _PER_THREAD)

    @property
    def at_once(self) -> int:
        """Planes of a product."""
        return COLUMNS // self.width

    @property
    def products(self) -> int:
        """For all planes."""
        return PLANES // self.at_once

    @property
    def used(self) -> int:
        """Of a thread's columns, those with a token of their own."""
        return min(self.tokens, _PER_THREAD)

    @property
    def numbers(self) -> int:
        """Of all products' columns."""
        return COLUMNS * self.products

    @property
    def of_unit(self) -> int:
        """Sums of a thread for a unit."""
        return self.products * _HALVES * self.used

    def first_token(self, me: Lane) -> Word:
        """Of a thread's columns."""
        return (me.pair * _PER_THREAD) % self.width

    def plane(self, me: Lane) -> Word:
        """That a thread's columns have of a product's planes."""
        return (me.pair * _PER_THREAD) // self.width


@dataclasses.dataclass(frozen=True)
class Flat:
    """Where tokens' codes lie in shared memory: 16 bytes are left out after every `run`, against bank conflicts.

    Of 64 codes, words (four codes) 0, 4, 8 and 12 come first, then 1, 5, 9 and 13, and so on: what a thread multiplies
    lies together.
    """

    r: int

    @property
    def run(self) -> int:
        """Codes that lie next to each other."""
        return 128 if self.r % 128 == 0 else 64

    def size(self, count: int) -> int:
        """Bytes of so many codes, whole runs, and what is left out."""
        return count + 16 * (count // self.run)

    def stride(self, count: int) -> int:
        """Bytes from a token of so many codes to the next one, which begins in another bank."""
        return self.size(count) + 16

    def token(self, codes: ir.Value, index: int) -> Word:
        """The address of a token in `[tokens, stride]`."""
        return threads.address(codes) + index * threads.shape(codes)[1]

    def place(self, index: Word) -> Word:
        """Where a code's byte is."""
        word = index // 4
        return self.chunk(index // 64 * 64) + (word & 3) * 16 + ((word // 4) & 3) * 4 + (index & 3)

    def chunk(self, first: Word) -> Word:
        """Where 16 bytes begin that are so many bytes after the first one, but for what is left out."""
        return first + (first // self.run) * 16


def start(rows: Rows, tokens: int, grouped: bool) -> jax.Array:
    """Sums to begin with: for every unit of a warp and every product, of a row and of that eight below it.

    If a row has but one pair of scales, each product's sums of codes come after them.
    """
    columns = Columns(tokens)
    count = columns.of_unit * rows.of_warp + (0 if grouped else columns.products * columns.used)

    @threads.on_threads(return_type=threads.values(count, jnp.float32))
    def nothing(_):
        return threads.as_array([threads.real(0.0)] * count)

    return nothing()


def add_tile(
    sums, codes_smem, scales_smem, token_smem, table_smem, tile, *, rows: Rows, flat: Flat
) -> jax.Array:
    """Sums with a tile's products added.

    Args:
      sums: as `start` makes them.
      codes_smem: `[rows, PLANE]` bytes, `SWIZZLED`.
      scales_smem: `[parts, 8, rows]` float16, (α, μ) of the tile's planes; None if a row has but one pair.
      token_smem: `[tokens, bytes]`, tokens' codes, as `flat` says, all tiles'.
      table_smem: `[tiles + 1, numbers]` int32: see `write_table`.
      tile: which of them it is.
    """
    count, grouped = sums.shape[0] // 128, scales_smem is not None
    refs = [plgpu.RefType(SWIZZLED), *[plgpu.RefType()] * (3 if grouped else 2)]
    columns = Columns(token_smem.shape[0])

    @threads.on_threads(
        arg_types=(threads.per_thread(count), plgpu.Layout.WG_SPLAT, *refs),
        return_type=threads.values(count, jnp.float32),
    )
    def add(_, sums, tile, codes, tokens, table, *scales):
        y, me, tile = list(threads.reals(sums)), Lane(rows), threads.splat_word(tile)
        operands = _load_tokens(me, tokens, tile, flat, columns)
        begins, of_codes = _load_begins(me, table, tile, columns)
        if not scales:
            at = columns.of_unit * rows.of_warp
            for i, value in enumerate(value for found in of_codes for value in found):
                y[at + i] = y[at + i] + value
        kinds = [(product, half) for product in range(columns.products) for half in range(_HALVES)]
        for i in range(rows.of_warp):
            packed = me.codes(threads.address(codes), i)
            # Before the products, which they would wait for.
            pairs = [_scales(me, threads.address(scales[0]), i, *kind, columns) for kind in kinds if scales]
            found = [_multiply(packed, operands[k], k, columns, me) for k in range(columns.products)]
            for j, (product, half) in enumerate(kinds):
                for other in range(columns.used):
                    at = i * columns.of_unit + j * columns.used + other
                    value = found[product][half * _PER_THREAD + other] + begins[product][other]
                    if pairs:
                        alpha, mu = pairs[j]
                        so_far = of_codes[product][other].times_plus(mu, y[at])
                        y[at] = value.converted().times_plus(alpha, so_far)
                    else:
                        y[at] = y[at] + value.converted()
        return threads.as_array(y)

    operands = [codes_smem, token_smem, table_smem, *([scales_smem] if grouped else [])]
    return add(sums, tile, *operands)


def _load_begins(
    me: Lane, table: ir.Value, tile: Word, columns: Columns
) -> tuple[list[list[Word]], list[list[Real]]]:
    """For each product, what a thread's columns begin with; and what μ is multiplied by, as many times too large."""
    begin = threads.address(table) + tile * (4 * columns.numbers)
    if me.rows.shares > 1:
        begin = threads.select(me.share.equals(0), begin, _zeros(table))
    begin = begin + me.pair * (4 * _PER_THREAD)
    begins = [
        threads.load(begin, columns.used, offset=4 * COLUMNS * product) for product in range(columns.products)
    ]
    return begins, [[threads.real(0.0) - each.converted() for each in found] for found in begins]


def _load_tokens(me: Lane, tokens: ir.Value, tile: Word, flat: Flat, columns: Columns) -> list[list[Word]]:
    """For each product, the right operands of a warp's share of the columns."""
    # Of a token that is missing, the last one's codes: nobody reads those sums.
    token = (me.group % columns.width).least(columns.tokens - 1)
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
    packed: list[list[Word]], tokens: list[Word], product: int, columns: Columns, me: Lane
) -> list[Word]:
    """A thread's sums of a warp's unit over its share of a tile's columns: of two rows, two columns each."""
    found, first = [], product * columns.at_once
    for plane in range(first, first + columns.at_once):
        sums = [threads.word(0)] * (_HALVES * _PER_THREAD)
        for j, each in enumerate(packed):
            sums = threads.multiply_bytes(plane_of(each, plane), tokens[2 * j : 2 * j + 2], sums)
        found.append(sums)
    mine, chosen = columns.plane(me), found[-1]
    for plane, sums in enumerate(found[:-1]):
        chosen = [threads.select(mine.equals(plane), *both) for both in zip(sums, chosen, strict=True)]
    return chosen


def _scales(me: Lane, scales: Word, i: int, product: int, half: int, columns: Columns) -> tuple[Real, Real]:
    """(α, μ) of a row of a warp's unit i, in the plane that a thread's columns of a product have."""
    each = me.rows.each
    at = scales + (me.scale(i, half) + columns.plane(me) * each) * 2
    offset = 2 * product * columns.at_once * each
    return threads.load_half(at, offset=offset), threads.load_half(at, offset=offset + 2 * PLANES * each)


def write_table(codes: ir.Value, table: ir.Value, flat: Flat, count: int) -> None:
    """Numbers for every tile, from tokens' codes, which the products' columns begin with; after the last, zeros.

    `U = T + 1` is what is stored, so a column that multiplies plane p of it with codes q begins with `-4ᵖ Σ q`; for
    token i that is number `width · p + i`. `count` threads share the work, and are to be waited for.
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
                threads.store(at, threads.word(0) - (total << (group & 3) * 2), offset=4 * token)
    with threads.when(me < columns.numbers):
        threads.store(_zeros(table) + me * 4, threads.word(0))


def write_sums(sums, parts_smem, scales_gmem, first_row, *, rows: Rows) -> None:
    """A warpgroup's sums, planes added up, into `parts_smem` `[shares, tokens, rows]` float32.

    Where a row has one pair (α, μ), `scales_gmem` `[1, 2, all rows]` has it, and the row is `first_row` and more;
    None elsewhere.
    """
    refs = [plgpu.RefType()] * (1 + (scales_gmem is not None))
    t = parts_smem.shape[1]
    columns = Columns(t)

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
            for half in range(_HALVES):
                row, token = me.row(i, half), columns.first_token(me)
                pair = None
                if scales is not None:
                    n = threads.shape(scales)[-1]
                    at = (first + row.least(rows.count - 1)).least(n - 1)
                    pair = [threads.load_real(scales, at + kind * n) for kind in range(2)]
                for other in range(columns.used):
                    at = i * columns.of_unit + half * columns.used + other
                    value = total(at, _HALVES * columns.used)
                    if pair is not None:
                        of_codes = total(columns.of_unit * rows.of_warp + other, columns.used)
                        value = of_codes.times_plus(pair[1], value * pair[0])
                    for distance in (1, 2):
                        if distance * _PER_THREAD >= columns.width:
                            value = value + threads.shuffle(value, distance)
                    writes = threads.both(plane.equals(0), token + other < t, row < rows.count)
                    with threads.when(writes):
                        at = (me.share * t + token + other) * rows.count + row
                        threads.store(threads.address(parts) + at * 4, value)

    operands = [parts_smem] + ([] if scales_gmem is None else [scales_gmem])
    write(sums, first_row, *operands)


def _zeros(table: ir.Value) -> Word:
    """The address of the table's last row."""
    rows, columns = threads.shape(table)
    return threads.address(table) + (rows - 1) * 4 * columns
