"""Tiles of two-bit codes times one token, on `mma.sync`, thread by thread (Mosaic GPU).

The token is the right operand's columns, several times: column p of eight has the codes that meet plane p of a tile,
and zeros elsewhere. So the sums of a tile's four groups come out apart, next to each other, and codes can stay where
they lie in their bytes, 4, 16 and 64 times too large. The other four columns carry the groups' sums of the token's
codes, which μ is multiplied by as α is by the first four.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.gpu_threads import Word
from twla_jax.ops.ternary_matmul.gpu_rows import SUMS, SWIZZLED, Lane, Rows, plane_of
from twla_jax.packing import PLANE, TILE

COLUMNS = 8  # of `mma.sync`
PLANES = 4


def width(tokens: int) -> int:
    """Tokens filled up to a power of two."""
    return 1 << (tokens - 1).bit_length()


def table_columns(tokens: int) -> int:
    """Numbers that products begin with, for a tile."""
    return max(PLANES * width(tokens), COLUMNS)


@dataclasses.dataclass(frozen=True)
class Flat:
    """Where tokens' codes lie in shared memory: 16 bytes are left out after every `run`, against bank conflicts."""

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
        return index + (index // self.run) * 16


def start(rows: Rows, tokens: int, grouped: bool) -> jax.Array:
    """Sums to begin with: for each of a warp's units, two columns of one row, and two of the row eight below it."""
    del tokens, grouped  # which `gpu_several.start` takes

    @threads.on_threads(return_type=threads.values(SUMS * rows.of_warp, jnp.float32))
    def nothing(_):
        return threads.as_array([threads.real(0.0)] * (SUMS * rows.of_warp))

    return nothing()


def add_tile(
    sums, codes_smem, scales_smem, token_smem, table_smem, tile, *, rows: Rows, flat: Flat
) -> jax.Array:
    """Sums with a tile's products added.

    Args:
      sums: as `start` makes them.
      codes_smem: `[rows, PLANE]` bytes, `SWIZZLED`.
      scales_smem: `[parts, 8, rows]` float16, (α, μ) of the tile's planes; None if a row has but one pair.
      token_smem: `[1, bytes]`, the token's codes, as `flat` says, all tiles'.
      table_smem: `[tiles + 1, 8]` int32: see `write_table`.
      tile: which of them it is.
    """
    count = SUMS * rows.of_warp
    grouped = scales_smem is not None
    refs = [plgpu.RefType(SWIZZLED), *[plgpu.RefType()] * (3 if grouped else 2)]

    @threads.on_threads(
        arg_types=(threads.per_thread(count), plgpu.Layout.WG_SPLAT, *refs),
        return_type=threads.values(count, jnp.float32),
    )
    def add(_, sums, tile, codes, token, table, *scales):
        before, me, tile = threads.reals(sums), Lane(rows), threads.splat_word(tile)
        column = me.lane & (COLUMNS - 1)
        tokens = load_token(me, threads.address(token), column, zeros(table), tile, flat)
        begin = threads.address(table) + tile * (4 * COLUMNS)
        if rows.shares > 1:
            begin = threads.select(me.share.equals(0), begin, zeros(table))
        begin = threads.load(begin + me.pair * 8, 2)
        after = []
        for i in range(rows.of_warp):
            products = _multiply(me.codes(threads.address(codes), i), tokens, [*begin, *begin])
            for index, product in enumerate(products):
                half, other = divmod(index, 2)
                value, so_far = product.converted(), before[len(after)]
                if not scales:
                    after.append(so_far + value)
                    continue
                at = me.scale(i, half) + (me.pair * 2 + other) * rows.each
                scale = threads.load_half(threads.address(scales[0]) + at * 2)
                after.append(value.times_plus(scale, so_far))
        return threads.as_array(after)

    operands = [codes_smem, token_smem, table_smem, *([scales_smem] if grouped else [])]
    return add(sums, tile, *operands)


def write_table(codes: ir.Value, table: ir.Value, flat: Flat, count: int) -> None:
    """Numbers for every tile, from tokens' codes, which the products' columns begin with; after the last, zeros.

    `U = T + 1` is what is stored, so a column that multiplies plane p of it with codes q begins with `-4ᵖ Σ q`; for
    token i that is number `width · p + i`. A single token's other four columns have `Σ q`. `count` threads share the
    work, and are to be waited for.
    """
    me, first = threads.thread(), threads.address(table)
    rows, columns = threads.shape(table)
    tokens = threads.shape(codes)[0]
    chunks = (rows - 1) * TILE // 16
    for i in range(-(-chunks // count)):
        chunk = me + i * count
        place = flat.place(chunk.least(chunks - 1) * 16)
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
            at = first + (group // PLANES) * (4 * columns) + (group & 3) * (4 * width(tokens))
            for token, total in enumerate(totals):
                threads.store(at, threads.word(0) - (total << (group & 3) * 2), offset=4 * token)
            if tokens == 1:
                threads.store(at, totals[0], offset=16)
    with threads.when(me < columns):
        threads.store(zeros(table) + me * 4, threads.word(0))


def write_sums(sums, parts_smem, scales_gmem, first_row, *, rows: Rows) -> None:
    """A warpgroup's sums, columns added up, into `parts_smem` `[shares, 1, rows]` float32.

    Where a row has one pair (α, μ), `scales_gmem` `[1, 2, all rows]` has it, and the row is `first_row` and more;
    None elsewhere.
    """
    refs = [plgpu.RefType()] * (1 + (scales_gmem is not None))

    @threads.on_threads(arg_types=(threads.per_thread(SUMS * rows.of_warp), plgpu.Layout.WG_SPLAT, *refs))
    def write(_, sums, first_row, parts, scales=None):
        values, me = threads.reals(sums), Lane(rows)
        first = threads.splat_word(first_row)
        small = me.pair.equals(1)
        weights = [
            threads.select(small, threads.real(one), threads.real(other))
            for one, other in ((1 / 16, 1.0), (1 / 64, 1 / 4))
        ]
        last = me.pair >= 2
        weights = [threads.select(last, threads.real(1.0), weight) for weight in weights]
        for i in range(rows.of_warp):
            for half in range(2):
                first_column = SUMS * i + 2 * half
                total = values[first_column] * weights[0] + values[first_column + 1] * weights[1]
                row = me.row(i, half)
                if scales is not None:
                    all_rows = threads.shape(scales)[-1]
                    at = (first + row.least(rows.count - 1)).least(all_rows - 1)
                    kind = threads.select(last, threads.word(1), threads.word(0))
                    total = total * threads.load_real(scales, at + kind * all_rows)
                for distance in (1, 2):
                    total = total + threads.shuffle(total, distance)
                with threads.when(threads.both(me.pair.equals(0), row < rows.count)):
                    threads.store(threads.address(parts) + (row + me.share * rows.count) * 4, total)

    operands = [parts_smem] + ([] if scales_gmem is None else [scales_gmem])
    write(sums, first_row, *operands)


def load_token(
    me: Lane, token: Word, column: Word, none: Word, tile: Word, flat: Flat, at_once: int = PLANES
) -> list[list[Word]]:
    """For each plane, the right operands of a warp's share of the columns.

    `token` is the address of the codes that this thread's row of a matrix has in every plane that is `column` modulo
    `at_once`, and `none` that of zeros, which it has in all others.
    """
    here = token + tile * flat.size(TILE) + (me.lane // 8) * 16 + me.share * flat.size(PLANE // 2)
    planes = []
    for plane in range(PLANES):
        mine = column.equals(plane % at_once)
        places = [here + flat.size(plane * PLANE + half * PLANE // 2) for half in range(2 // me.rows.shares)]
        planes.append(
            [each for at in places for each in threads.load_matrices(threads.select(mine, at, none))]
        )
    return planes


def _multiply(codes: list[list[Word]], tokens: list[list[Word]], begin: list[Word]) -> list[Word]:
    """Sums of a warp's unit, four a thread, over its share of a tile's columns."""
    # Two sums, as a product waits for the one before that adds to the same.
    sums = [begin, [threads.word(0)] * 4]
    for j, packed in enumerate(codes):
        for plane in range(PLANES):
            sums[plane % 2] = threads.multiply_bytes(
                plane_of(packed, plane), tokens[plane][2 * j : 2 * j + 2], sums[plane % 2]
            )
    return [one + other for one, other in zip(*sums, strict=True)]


def zeros(table: ir.Value) -> Word:
    """The address of the table's last row."""
    rows, columns = threads.shape(table)
    return threads.address(table) + (rows - 1) * 4 * columns
