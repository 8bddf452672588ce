"""Two-bit weights times up to eight int8 tokens on Hopper GPUs (Pallas Mosaic GPU), thread by thread.

One block for each multiprocessor has its rows' weights under way from the beginning, as far as they fit, behind the
tokens, which every block reads whole. Warpgroups share the columns; weight rows are the rows of `mma.sync` and tokens
its columns. Codes are multiplied where they lie in their bytes: each plane of a tile is a group with scales of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8

from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.gpu_threads import Real, Word
from twla_jax.ops.ternary_matmul import tiles as tuning
from twla_jax.ops.ternary_matmul.gpu_rows import (
    PLANES,
    SUMS,
    SWIZZLED,
    Lane,
    Rows,
    add_paired,
    copy_tiles,
    load_pair,
    plane_of,
)
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.packing import PLANE, TILE

_COLUMNS = 8  # of `mma.sync`: tokens
_CHUNK = 16  # bytes that a thread reads at once
_ENDS = 4  # numbers that a row of `ends_smem` has room for


def obstacle(tokens: int, weight: KernelWeight) -> str | None:
    """Why the kernel cannot take so many tokens, or None."""
    if tokens > _COLUMNS:
        return f"there are {tokens} tokens, more than {_COLUMNS}"
    try:
        tuning.few_tiles(tokens, len(weight.codes), weight.tiles)
    except ValueError as error:
        return str(error)
    return None


def matmul(
    x: Int8[Array, "t m"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
    tiles: tuning.FewTiles | None = None,
) -> Float[Array, "t rows"]:
    """What `reference.matmul` computes, for int8 x."""
    t, n = len(x), len(weight.codes)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _CHUNK)))
    tiles = tiles or tuning.few_tiles(t, n, weight.tiles)
    rows, groups = Rows(tiles.rows, 1), tiles.warpgroups
    return plgpu.kernel(
        functools.partial(_kernel, rows=rows, tiles=tiles, weight=weight),
        out_type=jax.ShapeDtypeStruct((t, n), out_dtype),
        grid=(pl.cdiv(n, rows.each),),
        grid_names=("rows",),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types={
            "codes_smem": plgpu.SMEM((tiles.slots, rows.count, PLANE), jnp.uint8, transforms=SWIZZLED),
            "scales_smem": plgpu.SMEM((tiles.slots, 1, 1, PLANES, rows.scales), jnp.int16),
            # The tokens are used up when sums are written.
            "tokens_or_parts_smem": plgpu.RefUnion(
                plgpu.SMEM((t, tuning.token_bytes(weight.tiles)), jnp.int8),
                plgpu.SMEM((groups * rows.shares, t, rows.count), jnp.float32),
            ),
            "sums_smem": plgpu.SMEM((PLANES * weight.tiles, _COLUMNS), jnp.int32),
            "ends_smem": plgpu.SMEM((rows.count + _COLUMNS, _ENDS), jnp.float32),
            "filled": plgpu.Barrier(num_arrivals=2 if weight.grouped else 1, num_barriers=tiles.slots),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(weight.codes, weight.gpu_scales, weight.row_sums, weight.bias, weight.steps, x, scale, zero_point)


def _kernel(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    steps_gmem,
    x_gmem,
    scale_gmem,
    zero_point_gmem,
    out_gmem,
    *,
    codes_smem,
    scales_smem,
    tokens_or_parts_smem,
    sums_smem,
    ends_smem,
    filled,
    rows: Rows,
    tiles: tuning.FewTiles,
    weight: KernelWeight,
):
    tokens_smem, parts_smem = tokens_or_parts_smem
    slots, groups = tiles.slots, tiles.warpgroups
    count = 128 * groups
    group = lax.axis_index("warpgroup")
    first_row = lax.axis_index("rows") * rows.each
    steps, own_slots = (lax.div(each - group + groups - 1, groups) for each in (weight.tiles, slots))

    def slot_of(step):
        """The warpgroup's slots are those of its first tiles."""
        return lax.rem(step, own_slots) * groups + group

    def memory(slot):
        return codes_smem.at[slot], scales_smem.at[slot] if weight.grouped else None

    def fetch(step):
        slot, tile = slot_of(step), step * groups + group
        source = codes_gmem, scales_gmem
        copy_tiles(source, memory(slot), filled.at[slot], tile, first_row, 0, tiles=1, rows=rows)

    # The tokens before the weights, behind which they would queue up.
    words = _fetch_tokens(x_gmem, weight.tiles, count)
    of_rows, of_tokens = (row_sums_gmem, bias_gmem, steps_gmem), (scale_gmem, zero_point_gmem)
    ends = _fetch_ends(of_rows, of_tokens, first_row, rows, count)
    for i in range(-(-slots // groups)):
        pl.when(i < own_slots)(functools.partial(fetch, jnp.int32(i)))
    _store_ends(ends, ends_smem, rows, count)
    _store_tokens(words, tokens_smem, sums_smem, weight.tiles, count)

    def step(k, sums):
        slot = slot_of(k)
        plgpu.barrier_wait(filled.at[slot])
        sums = _add_tile(sums, *memory(slot), tokens_smem, sums_smem, k * groups + group, rows)
        if slots < weight.tiles:
            pl.when(k + own_slots < steps)(functools.partial(fetch, k + own_slots))
        return sums

    sums = lax.fori_loop(0, steps, step, _start(rows, weight.grouped))
    of_all = None if weight.grouped else scales_gmem
    _write_parts(sums, parts_smem, of_all, first_row, rows, count)
    _finish(parts_smem, ends_smem, first_row, out_gmem, rows, count)


def _chunks(t: int, tiles: int, count: int) -> int:
    """Of 16 bytes, that each of `count` threads reads."""
    return -(-t * tiles * (TILE // _CHUNK) // count)


def _fetch_tokens(x_gmem, tiles: int, count: int) -> jax.Array:
    """Starts the way of the tokens to the threads."""
    t, m = x_gmem.shape
    each = tiles * (TILE // _CHUNK)

    @threads.on_threads(
        arg_types=(plgpu.RefType(),), return_type=threads.values(4 * _chunks(t, tiles, count), jnp.int32)
    )
    def start(_, x):
        found = []
        for i in range(_chunks(t, tiles, count)):
            index = threads.thread() + i * count
            token, chunk = index // each, index % each
            real = threads.both(token < t, chunk < m // _CHUNK)
            found += threads.load_global(x, token * m + chunk * _CHUNK, 4, condition=real)
        return threads.as_array(found)

    return start(x_gmem)


def _store_tokens(words, tokens_smem, sums_smem, tiles: int, count: int) -> None:
    """Tokens, and each one's sums of the tiles' planes. Waits for the block."""
    t, each = tokens_smem.shape[0], tiles * (TILE // _CHUNK)
    stride = tokens_smem.shape[1]

    @threads.on_threads(
        arg_types=(threads.per_thread(words.shape[0] // 128), plgpu.RefType(), plgpu.RefType())
    )
    def store(_, words, tokens, sums):
        found, me = threads.words(words), threads.thread()
        for i in range(len(found) // 4):
            four, index = found[4 * i : 4 * i + 4], me + i * count
            token, chunk = index // each, index % each
            total = threads.word(0)
            for word in four:
                total = threads.sum_of_bytes(word, total)
            for distance in (1, 2, 4):  # the eight threads of a plane are neighbours
                total = total + threads.shuffle(total, distance)
            with threads.when(token < t):
                threads.store(threads.address(tokens) + token * stride + chunk * _CHUNK, *four)
            with threads.when(threads.both(token < t, (chunk & 7).equals(0))):
                at = threads.address(sums) + (chunk // 8) * (4 * _COLUMNS) + token * 4
                threads.store(at, total)
        threads.barrier(count)

    store(words, tokens_smem, sums_smem)


def _start(rows: Rows, grouped: bool) -> jax.Array:
    """Sums to begin with; where a row has one pair of scales, the tokens' sums of codes after them."""
    count = SUMS * rows.of_warp + (0 if grouped else 2)

    @threads.on_threads(return_type=threads.values(count, jnp.int32))
    def zeros(_):
        return threads.as_array([threads.word(0)] * count)

    return zeros()


def _add_tile(sums, codes_smem, scales_smem, tokens_smem, sums_smem, tile, rows: Rows) -> jax.Array:
    """Sums with a tile's products added: each an `mma.sync` has it, tokens in place of columns."""
    count, grouped = sums.shape[0] // 128, scales_smem is not None
    refs = [plgpu.RefType(SWIZZLED), *[plgpu.RefType()] * (3 if grouped else 2)]
    t, stride = tokens_smem.shape

    @threads.on_threads(
        arg_types=(threads.per_thread(count), plgpu.Layout.WG_SPLAT, *refs),
        return_type=threads.values(count, jnp.int32),
    )
    def add(_, sums, tile, codes, tokens, totals, *scales):
        me, tile = Lane(rows), threads.splat_word(tile)
        # In place of a token that is missing, the last one: nobody reads those sums.
        token = (me.lane & (_COLUMNS - 1)).least(t - 1)
        at = threads.address(tokens) + token * stride
        at = at + tile * TILE + (me.lane // 8) * _CHUNK + me.share * (PLANE // 2)
        y = list(threads.words(sums))
        operands, of_planes = [], []
        for plane in range(PLANES):
            halves = [plane * PLANE + half * PLANE // 2 for half in range(2 // rows.shares)]
            operands.append([each for half in halves for each in threads.load_matrices(at + half)])
            group = threads.address(totals) + (tile * PLANES + plane) * (4 * _COLUMNS)
            found = threads.load(group + me.pair * 8, 2)
            if rows.shares > 1:
                found = [threads.select(me.share.equals(0), each, threads.word(0)) for each in found]
            if scales:
                of_planes.append([each & 0xFFFF for each in found])
            else:
                of_planes.append(found)
                y[-2:] = [so_far + each for so_far, each in zip(y[-2:], found, strict=True)]
        for i in range(rows.of_warp):
            packed = me.codes(threads.address(codes), i)
            for plane, (operand, total) in enumerate(zip(operands, of_planes, strict=True)):
                product = [threads.word(0)] * SUMS
                for j, each in enumerate(packed):
                    product = threads.multiply_bytes(
                        plane_of(each, plane), operand[2 * j : 2 * j + 2], product
                    )
                pairs = [
                    load_pair(me, scales[0], threads.word(0), i, half, plane) if scales else None
                    for half in range(2)
                ]
                _add_plane(y, product, total, plane, i, pairs)
        return threads.as_array(y)

    operands = [codes_smem, tokens_smem, sums_smem, *([scales_smem] if grouped else [])]
    return add(sums, tile, *operands)


def _add_plane(
    y: list[Word], product: list[Word], total: list[Word], plane: int, i: int, pairs: list[Word | None]
) -> None:
    """A unit's products with a plane, scaled if rows have pairs for it, onto its sums."""
    for half, pair in enumerate(pairs):
        for column in range(2):
            index, at = 2 * half + column, SUMS * i + 2 * half + column
            if pair is None:
                y[at] = y[at] + (product[index] >> 2 * plane)
            else:
                y[at] = add_paired(product[index], 1 << (16 - 2 * plane), total[column], pair, y[at])


def _write_parts(sums, parts_smem, scales_gmem, first_row, rows: Rows, count: int) -> None:
    """A warpgroup's sums into `[warpgroups · shares, tokens, rows]`, scaled where a row has one pair. Waits before."""
    refs = [plgpu.RefType()] * (1 + (scales_gmem is not None))
    t = parts_smem.shape[1]
    group = lax.axis_index("warpgroup")

    @threads.on_threads(
        arg_types=(threads.per_thread(sums.shape[0] // 128), *[plgpu.Layout.WG_SPLAT] * 2, *refs)
    )
    def write(_, sums, first_row, group, parts, scales=None):
        values, me = threads.words(sums), Lane(rows)
        first, part = threads.splat_word(first_row), threads.splat_word(group) * rows.shares + me.share
        threads.barrier(count)
        for i in range(rows.of_warp):
            for half in range(2):
                row = me.row(i, half)
                pair = None
                if scales is not None:
                    n = threads.shape(scales)[-1]
                    at = (first + row.least(rows.count - 1)).least(n - 1)
                    pair = [threads.load_real(scales, at + kind * n) for kind in range(2)]
                for column in range(2):
                    acc, token = values[SUMS * i + 2 * half + column], me.pair * 2 + column
                    value = acc.converted()
                    if pair is not None:  # α and μ of T, but U is what was multiplied
                        q = values[column - 2]
                        value = (acc - q).converted() * pair[0] + q.converted() * pair[1]
                    with threads.when(threads.both(row < rows.count, token < t)):
                        at = (part * t + token) * rows.count + row
                        threads.store(threads.address(parts) + at * 4, value)
        threads.barrier(count)

    write(sums, first_row, group, parts_smem, *([] if scales_gmem is None else [scales_gmem]))


def _fetch_ends(of_rows, of_tokens, first_row, rows: Rows, count: int) -> jax.Array:
    """Starts the way to the threads of what sums end with: numbers of rows, and of a token."""
    t, n = of_tokens[0].shape[0], of_rows[0].shape[0]
    each = -(-rows.count // count)

    @threads.on_threads(
        arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * (len(of_rows) + len(of_tokens))),
        return_type=threads.values(len(of_rows) * each + len(of_tokens), jnp.float32),
    )
    def start(_, first_row, *refs):
        me, found = threads.thread(), []
        for i in range(each):
            row = (threads.splat_word(first_row) + me + i * count).least(n - 1)
            found += [threads.load_real(ref, row) for ref in refs[: len(of_rows)]]
        token = me.least(t - 1)
        return threads.as_array(found + [threads.load_real(ref, token) for ref in refs[len(of_rows) :]])

    return start(first_row, *of_rows, *of_tokens)


def _store_ends(ends, ends_smem, rows: Rows, count: int) -> None:
    """What `_fetch_ends` found into shared memory, rows' first."""

    @threads.on_threads(arg_types=(threads.per_thread(ends.shape[0] // 128), plgpu.RefType()))
    def store(_, ends, memory):
        *of_rows, scale, zero_point = threads.reals(ends)
        me, at = threads.thread(), threads.address(memory)
        for i in range(len(of_rows) // 3):
            with threads.when(me + i * count < rows.count):
                row_sum, bias, step = of_rows[3 * i : 3 * i + 3]
                here = at + (me + i * count) * (4 * _ENDS)
                threads.store(here, row_sum, bias)
                threads.store(here, step, offset=8)
        with threads.when(me < _COLUMNS):
            threads.store(at + me * (4 * _ENDS), scale, zero_point, offset=4 * _ENDS * rows.count)

    store(ends, ends_smem)


def _finish(parts_smem, ends_smem, first_row, out_gmem, rows: Rows, count: int) -> None:
    """Adds up what warpgroups have, and scales and writes it."""
    parts_count, t, _ = parts_smem.shape
    n = out_gmem.shape[1]

    @threads.on_threads(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * 3))
    def write(_, first_row, parts, ends, out):
        first = threads.splat_word(first_row)
        for i in range(-(-rows.count * t // count)):
            index = threads.thread() + i * count
            row, token = index % rows.count, index // rows.count
            with threads.when(threads.both(token < t, first + row < n)):
                at = threads.address(parts) + (token * rows.count + row) * 4
                shares = [
                    threads.load(at, offset=4 * t * rows.count * part)[0].real()
                    for part in range(parts_count)
                ]
                of_row, of_token = (threads.address(ends) + each * (4 * _ENDS) for each in (row, token))
                row_sum, bias, step, _ = (each.real() for each in threads.load(of_row, 4))
                scale, zero_point = (
                    each.real() for each in threads.load(of_token, 2, offset=4 * _ENDS * rows.count)
                )
                total = step * functools.reduce(Real.__add__, shares) - zero_point * row_sum
                threads.store_real(out, token * n + first + row, scale * total + bias)

    write(first_row, parts_smem, ends_smem, out_gmem)
