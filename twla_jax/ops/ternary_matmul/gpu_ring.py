"""Two-bit weights of a block's rows, through rings of shared memory, times a few tokens' codes that lie there, too.

For Hopper GPUs (Pallas Mosaic GPU), thread by thread. Where the codes come from is for others to say: `gpu_few` is
given them, and a linear in one kernel makes them. Meanwhile the weights come from memory, as many of them under way as
memory needs and no more. Warpgroups share the columns, each with a ring of its own, and their sums meet in shared
memory. If all of a block's weights have room, they come in a few copies, as it takes a while to begin one. If a
multiprocessor has more rows than a block takes at once, its block takes them one after the other, and the next ones'
weights are under way while the sums of those before are written: it has the tokens already.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.core.packing import PLANE, TILE
from twla_jax.ops.hopper import threads as threads
from twla_jax.ops.hopper.threads import Real
from twla_jax.ops.ternary_matmul import gpu_products as products
from twla_jax.ops.ternary_matmul.gpu_products import Columns, Flat
from twla_jax.ops.ternary_matmul.gpu_rows import PLANES, SWIZZLED, Rows, copy_tiles
from twla_jax.ops.ternary_matmul.ring_tiles import Tiles
from twla_jax.ops.ternary_matmul.tile_configs import STREAMING_MULTIPROCESSORS
from twla_jax.ops.ternary_matmul.weight import KernelWeight


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where they go: `stored` `[tokens, n]`, and `sent` as words to whoever waits for them, likewise.

    What is sent is rounded to bf16, and lies below a `tag` in the upper half of its word.
    """

    stored: Any = None
    sent: Any = None
    tag: jax.Array | None = None


def blocks(n: int, rows: Rows) -> int:
    """For each part's n rows."""
    return min(pl.cdiv(n, rows.each), STREAMING_MULTIPROCESSORS)


def _passes(n: int, rows: Rows) -> int:
    """How often a block takes rows, at most."""
    return pl.cdiv(pl.cdiv(n, rows.each), blocks(n, rows))


def operands(weight: KernelWeight) -> tuple[jax.Array, ...]:
    """What `begin` has of a weight."""
    return weight.codes, weight.gpu_scales, weight.row_sums, weight.bias, weight.steps


def memory(rows: Rows, tiles: Tiles, weight: KernelWeight, *, tokens: int) -> dict[str, Any]:
    """What `begin` has of shared memory for itself."""
    groups, stages, together = tiles.warpgroups, tiles.stages, tiles.together
    return {
        "codes_smem": plgpu.SMEM(
            (groups, stages, together, rows.count, PLANE), jnp.uint8, transforms=SWIZZLED
        ),
        "scales_smem": plgpu.SMEM((groups, stages, rows.parts, together, PLANES, rows.scales), jnp.int16),
        "table_smem": plgpu.SMEM((weight.tiles + 1, Columns(tokens).numbers), jnp.int32),
        "filled": plgpu.Barrier(
            num_arrivals=(2 if weight.grouped else 1) * rows.parts, num_barriers=groups * stages
        ),
    }


def token_memory(tokens: int, weight: KernelWeight, flat: Flat):
    """Shared memory of tokens' codes."""
    return plgpu.SMEM((tokens, flat.stride(weight.tiles * TILE)), jnp.int8)


def parts_memory(n: int, rows: Rows, tiles: Tiles, *, tokens: int):
    """Shared memory of warpgroups' sums; of two passes, if there are several, as some may still be read."""
    passes = min(_passes(n, rows), 2)
    return plgpu.SMEM((passes, tiles.warpgroups, rows.shares, tokens, rows.count), jnp.float32)


def begin(
    of_weight,
    residual,
    outputs: Outputs,
    *,
    codes_smem,
    scales_smem,
    table_smem,
    x_smem,
    parts_smem,
    filled,
    rows: Rows,
    tiles: Tiles,
    weight: KernelWeight,
    flat: Flat,
    wide: bool = False,
    of_all: int | None = None,
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Starts on the outputs of a block's rows, of `blocks` blocks or of more, and returns what goes on with them.

    What tokens' codes are made of is to be asked for before: behind weights it would queue up.

    Args:
      of_weight: the `operands`, in global memory.
      residual: a list of nothing, or of `[tokens, n]`, to be added to the outputs.
      wide: whether the second half of the rows of codes belongs to the first half's tokens: outputs add up.
      of_all: how many blocks there are, if some may have no rows.
    Returns:
      fetch: of the ring's places, starts the way of weights to those from the first argument on to before the second,
        by default to all. Every place once.
      end: the products, and all that follows. Its argument `answer` leaves codes in x_smem, as `flat` says, and their
        sums in table_smem, as `gpu_products.write_table` does, for all of the block; and returns each token's scale and
        zero point, as `threads.as_array` has them. `alongside` is what a warpgroup does when its last weights are
        there.
    """
    codes_gmem, scales_gmem, *of_rows_gmem = of_weight
    groups, stages, together = tiles.warpgroups, tiles.stages, tiles.together
    t, n = x_smem.shape[0], weight.out_features // rows.parts
    group, block = lax.axis_index("warpgroup"), lax.axis_index("rows")
    several, others = _passes(n, rows) > 1, blocks(n, rows)
    if together > 1:  # neighbours
        own = pl.cdiv(weight.tiles, groups)
        first, distance, count = group * own, 1, jnp.maximum(jnp.minimum(weight.tiles - group * own, own), 0)
    else:
        first, distance, count = group, groups, lax.div(weight.tiles - group + groups - 1, groups)
    steps = lax.div(count + together - 1, together)
    passes = lax.div(pl.cdiv(n, rows.each) - block + others - 1, others)
    idle = of_all is not None and of_all > others
    all_steps, least = passes * steps if several or idle else steps, jnp.maximum(steps, 1)

    def first_row(index):
        """Of a pass."""
        return (block + index * others if several else block) * rows.each

    def memory(slot):
        return codes_smem.at[group, slot], scales_smem.at[group, slot] if weight.grouped else None

    def fetch(step, slot):
        """Of all passes' steps."""
        index, step = (lax.div(step, least), lax.rem(step, least)) if several else (0, step)
        tile, barrier = first + step * together * distance, filled.at[group * stages + slot]
        source = codes_gmem, scales_gmem
        copy_tiles(source, memory(slot), barrier, tile, first_row(index), n, tiles=together, rows=rows)

    def fetch_rows(index):
        return _fetch_rows(of_rows_gmem, residual, first_row(index), n, rows=rows)

    of_first = None if several else fetch_rows(0)

    def fetch_places(begin: int = 0, end: int = stages):
        for slot in range(begin, min(end, stages)):
            pl.when(slot < all_steps)(functools.partial(fetch, jnp.int32(slot), slot))

    def take(index, of_rows, ends, alongside):
        """A pass: all products of its rows, and their outputs."""

        def step(k, sums):
            each = index * steps + k if several else k
            slot = lax.rem(each, jnp.int32(stages))
            plgpu.barrier_wait(filled.at[group * stages + slot])
            if alongside:
                pl.when(k == steps - 1)(alongside)

            def add(place, sums):
                tile = first + (k * together + place) * distance
                return products.add_tile(
                    sums, *memory(slot), x_smem, table_smem, place, tile, rows=rows, flat=flat
                )

            if together == 1:
                sums = add(jnp.int32(0), sums)
            else:
                sums = lax.fori_loop(0, jnp.minimum(together, count - k * together), add, sums)
            if several or stages * together * groups < weight.tiles:
                pl.when(each + stages < all_steps)(functools.partial(fetch, each + stages, slot))
            return sums

        sums = lax.fori_loop(0, steps, step, products.start(rows, t, weight.grouped))
        parts = parts_smem.at[lax.rem(index, jnp.int32(2)) if several else 0]
        of_row, row = None if weight.grouped else scales_gmem, first_row(index)
        products.write_sums(sums, parts.at[group], of_row, row, rows=rows, of_part=n)
        _finish(parts, ends, row, of_rows, outputs, n=n, rows=rows, wide=wide)

    def end(answer: Callable[[], jax.Array], alongside: Callable[[], None] | None = None):
        ends = answer()
        if alongside:
            pl.when(jnp.logical_or(steps == 0, passes == 0))(alongside)
        if several:
            pl.loop(0, passes)(lambda index: take(index, fetch_rows(index), ends, alongside))
        elif idle:
            pl.when(passes > 0)(lambda: take(0, of_first, ends, alongside))
        else:
            take(0, of_first, ends, alongside)

    return fetch_places, end


def _fetch_rows(of_all, residual, first_row, n: int, *, rows: Rows) -> jax.Array:
    """For the row of each thread, what `of_all` have, for that of the second part likewise, and tokens' residuals."""
    refs = [*of_all, *residual]
    count = rows.parts * len(of_all) + sum(ref.shape[0] for ref in residual)

    @threads.on_threads(
        arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * len(refs)),
        return_type=threads.values(count, jnp.float32),
    )
    def start(_, first_row, *refs):
        row = (threads.splat_word(first_row) + threads.thread()).least(n - 1)
        found = [
            threads.load_real(ref, row + part * n)
            for part in range(rows.parts)
            for ref in refs[: len(of_all)]
        ]
        for ref in refs[len(of_all) :]:
            found += [threads.load_real(ref, row + token * n) for token in range(threads.shape(ref)[0])]
        return threads.as_array(found)

    return start(first_row, *refs)


def _finish(
    parts_smem, ends, first_row, of_rows, outputs: Outputs, *, n: int, rows: Rows, wide: bool
) -> None:
    """Adds up what warpgroups have, and scales and writes it, each row by a thread; waits for the block before."""
    groups, t = parts_smem.shape[0], parts_smem.shape[2]
    tokens = t // 2 if wide else t
    sent = [] if outputs.tag is None else [outputs.tag]
    refs = [ref for ref in (outputs.stored, outputs.sent) if ref is not None]

    @threads.on_threads(
        arg_types=(
            threads.per_thread(2 * t),
            plgpu.Layout.WG_SPLAT,
            threads.per_thread(of_rows.shape[0] // 128),
            *[threads.per_thread(1)] * len(sent),
            *[plgpu.RefType()] * (1 + len(refs)),
        )
    )
    def write(_, ends, first_row, of_rows, *more):
        tag, (parts, *refs) = more[: len(sent)], more[len(sent) :]
        stored, to = refs[: outputs.stored is not None], refs[outputs.stored is not None :]
        ends = threads.reals(ends)
        first, row = threads.splat_word(first_row), threads.thread()
        of_rows = threads.reals(of_rows)
        residuals = of_rows[3 * rows.parts :]
        threads.barrier(128 * groups)

        def sum_of(token: int, part: int) -> Real:
            (scale, zero_point), (row_sum, bias, step) = ends[2 * token :][:2], of_rows[3 * part :][:3]
            at = threads.address(parts) + (row + part * rows.each) * 4
            shares = [
                threads.load(at, offset=4 * rows.count * (i * t + token))[0].real()
                for i in range(rows.shares * groups)
            ]
            y = scale * (step * functools.reduce(Real.__add__, shares) - zero_point * row_sum)
            return y if wide and token >= tokens else y + bias

        def total(token: int, part: int) -> Real:
            y = sum_of(token, part)
            return y + sum_of(tokens + token, part) if wide else y

        with threads.when(threads.both(row < rows.each, first + row < n)):
            for token in range(tokens):
                y = total(token, 0)
                if rows.parts == 2:
                    y = _gated(y, total(token, 1))
                if residuals:  # rounded before, as two ops would
                    y = (y.to_bfloat16() if to else threads.rounded(y, stored[0])) + residuals[token]
                index = first + row + token * n
                for ref in to:
                    value = threads.pack_bfloat16(y, threads.real(0.0)) + threads.words(tag[0])[0]
                    threads.send(ref, index * 4, value)
                for ref in stored:
                    threads.store_real(ref, index, y)

    write(ends, first_row, of_rows, *sent, parts_smem, *refs)


def _gated(gate: Real, up: Real) -> Real:
    """`silu(gate) · up`, rounded to bf16 after every step, as XLA does it."""
    gate, up = gate.to_bfloat16(), up.to_bfloat16()
    small = threads.exponential(threads.real(0.0) - gate).to_bfloat16()
    sigmoid = (threads.real(1.0) / (small + 1.0).to_bfloat16()).to_bfloat16()
    return (gate * sigmoid).to_bfloat16() * up
