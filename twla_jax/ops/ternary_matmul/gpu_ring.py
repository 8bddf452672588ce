"""Streams a block's two-bit weight rows through rings in shared memory, and multiplies them by few tokens there.

It works on Hopper GPUs (Pallas Mosaic GPU), thread by thread. The caller provides the tokens' codes: `gpu_few` loads
them, and a linear in one kernel computes them. Meanwhile weights are loaded, as many in flight as memory needs and no
more. Warpgroups share the columns, each with a ring of its own, and their sums are combined in shared memory. If all of
a block's weights fit, they come in a few copies, since each takes a while to start. If a multiprocessor has more rows
than a block takes at once, its block takes them in passes; the weights of the next pass are in flight while the sums of
this one are written, and the tokens are there already.
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
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.epilogue import rescale
from twla_jax.ops.hopper.gate import silu_gate
from twla_jax.ops.hopper.limits import STREAMING_MULTIPROCESSORS
from twla_jax.ops.hopper.threads import Real
from twla_jax.ops.ternary_matmul import gpu_products
from twla_jax.ops.ternary_matmul.gpu_layout import Columns, Flat
from twla_jax.ops.ternary_matmul.gpu_rows import PLANES, SWIZZLED, Rows, copy_tiles
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig
from twla_jax.ops.ternary_matmul.weight import KernelWeight


@dataclasses.dataclass(frozen=True)
class RingOutputs:
    """Says where outputs go: to `stored` `[tokens, n]`, and as words to `sent`, for the blocks that wait for them.

    What is sent is rounded to bf16, and lies below a `tag` in the upper half of its word.
    """

    stored: Any = None
    sent: Any = None
    tag: jax.Array | None = None


def block_count(n: int, rows: Rows) -> int:
    """Return the number of blocks for n rows of each matrix."""
    return min(pl.cdiv(n, rows.each), STREAMING_MULTIPROCESSORS)


def _passes(n: int, rows: Rows) -> int:
    """Return how many passes a block takes over its rows, at most."""
    return pl.cdiv(pl.cdiv(n, rows.each), block_count(n, rows))


def weight_operands(weight: KernelWeight) -> tuple[jax.Array, ...]:
    """Return the global-memory operands of a weight."""
    return weight.codes, weight.gpu_scales, weight.row_sums, weight.bias, weight.steps


def scratch_types(rows: Rows, config: RingTileConfig, weight: KernelWeight, *, tokens: int) -> dict[str, Any]:
    """Return the shared memory that `product_stages` needs for itself."""
    groups, stages, together = config.warpgroups, config.stages, config.together
    return {
        "codes_smem": plgpu.SMEM(
            (groups, stages, together, rows.count, PLANE), jnp.uint8, transforms=SWIZZLED
        ),
        "scales_smem": plgpu.SMEM((groups, stages, rows.matrices, together, PLANES, rows.scales), jnp.int16),
        "table_smem": plgpu.SMEM((weight.column_tiles + 1, Columns(tokens).numbers), jnp.int32),
        "filled": plgpu.Barrier(
            num_arrivals=(2 if weight.grouped else 1) * rows.matrices, num_barriers=groups * stages
        ),
    }


def token_scratch(tokens: int, weight: KernelWeight, flat: Flat):
    """Return the shared memory of the tokens' codes."""
    return plgpu.SMEM((tokens, flat.stride(weight.column_tiles * TILE)), jnp.int8)


def partials_scratch(n: int, rows: Rows, config: RingTileConfig, *, tokens: int):
    """Return the shared memory of warpgroups' sums; of two passes, if there are several, as some are still read."""
    passes = min(_passes(n, rows), 2)
    return plgpu.SMEM((passes, config.warpgroups, rows.shares, tokens, rows.count), jnp.float32)


def product_stages(
    of_weight,
    residual,
    outputs: RingOutputs,
    *,
    codes_smem,
    scales_smem,
    table_smem,
    x_smem,
    partials_smem,
    filled,
    rows: Rows,
    config: RingTileConfig,
    weight: KernelWeight,
    flat: Flat,
    wide: bool = False,
    of_all: int | None = None,
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Prepare the outputs of a block's rows, of `block_count` blocks or more, and return the two stages that follow.

    The caller starts the loads of what tokens' codes are made of before this: behind weights they would queue up.

    Args:
      of_weight: the `weight_operands`, in global memory.
      residual: a list of nothing, or of `[tokens, n]`, to be added to the outputs.
      outputs: where outputs go.
      codes_smem: as `scratch_types` has it.
      scales_smem: as `scratch_types` has it.
      table_smem: as `scratch_types` has it.
      x_smem: as `token_scratch` has it.
      partials_smem: as `partials_scratch` has it.
      filled: as `scratch_types` has it.
      rows: the rows of a block.
      config: how the ring is split up.
      weight: whose codes these are.
      flat: the layout of the tokens' codes.
      wide: the second half of the codes are the tokens' finer ones, and outputs are the sum of both.
      of_all: how many blocks there are, if some may have no rows.

    Returns:
      start_prefetch: starts the loads of weights into the ring's places, from the first argument to before the
        second, by default into all. Every place is to be filled once.
      finish_outputs: the products, and all that follows. Its argument `answer` leaves codes in x_smem, as `flat`
        says, and their sums in table_smem, as `gpu_products.write_table` does, for all of the block; and returns each
        token's scale and zero point, as `threads.as_array` has them. `alongside` is what a warpgroup does when its
        last weights are there.
    """
    codes_gmem, scales_gmem, *of_rows_gmem = of_weight
    groups, stages, together = config.warpgroups, config.stages, config.together
    t, n = x_smem.shape[0], weight.out_features // rows.matrices
    group, block = lax.axis_index("warpgroup"), lax.axis_index("rows")
    several, others = _passes(n, rows) > 1, block_count(n, rows)
    if together > 1:  # neighbouring tiles
        own = pl.cdiv(weight.column_tiles, groups)
        first, distance, count = (
            group * own,
            1,
            jnp.maximum(jnp.minimum(weight.column_tiles - group * own, own), 0),
        )
    else:
        first, distance, count = group, groups, lax.div(weight.column_tiles - group + groups - 1, groups)
    steps = lax.div(count + together - 1, together)
    passes = lax.div(pl.cdiv(n, rows.each) - block + others - 1, others)
    idle = of_all is not None and of_all > others
    all_steps, least = passes * steps if several or idle else steps, jnp.maximum(steps, 1)

    def first_row(index):
        """Return the first row of a pass."""
        return (block + index * others if several else block) * rows.each

    def memory(slot):
        return codes_smem.at[group, slot], scales_smem.at[group, slot] if weight.grouped else None

    def fetch(step, slot):
        """Start the loads of one step, counted over all passes."""
        index, step = (lax.div(step, least), lax.rem(step, least)) if several else (0, step)
        tile, barrier = first + step * together * distance, filled.at[group * stages + slot]
        source = codes_gmem, scales_gmem
        copy_tiles(source, memory(slot), barrier, tile, first_row(index), n, tiles=together, rows=rows)

    def fetch_rows(index):
        return _fetch_rows(of_rows_gmem, residual, first_row(index), n, rows=rows)

    of_first = None if several else fetch_rows(0)

    def start_prefetch(first_slot: int = 0, last_slot: int = stages):
        for slot in range(first_slot, min(last_slot, stages)):
            pl.when(slot < all_steps)(functools.partial(fetch, jnp.int32(slot), slot))

    def take(index, of_rows, ends, alongside):
        """Compute a pass: all products of its rows, and their outputs."""

        def step(k, sums):
            each = index * steps + k if several else k
            slot = lax.rem(each, jnp.int32(stages))
            plgpu.barrier_wait(filled.at[group * stages + slot])
            if alongside:
                pl.when(k == steps - 1)(alongside)

            def add(place, sums):
                tile = first + (k * together + place) * distance
                return gpu_products.add_tile(
                    sums, *memory(slot), x_smem, table_smem, place, tile, rows=rows, flat=flat
                )

            if together == 1:
                sums = add(jnp.int32(0), sums)
            else:
                sums = lax.fori_loop(0, jnp.minimum(together, count - k * together), add, sums)
            if several or stages * together * groups < weight.column_tiles:
                pl.when(each + stages < all_steps)(functools.partial(fetch, each + stages, slot))
            return sums

        sums = lax.fori_loop(0, steps, step, gpu_products.initial_sums(rows, t, weight.grouped))
        partials = partials_smem.at[lax.rem(index, jnp.int32(2)) if several else 0]
        of_row, row = None if weight.grouped else scales_gmem, first_row(index)
        gpu_products.write_sums(sums, partials.at[group], of_row, row, rows=rows, matrix_rows=n)
        _finish(partials, ends, row, of_rows, outputs, n=n, rows=rows, wide=wide)

    def finish_outputs(answer: Callable[[], jax.Array], alongside: Callable[[], None] | None = None):
        ends = answer()
        if alongside:
            pl.when(jnp.logical_or(steps == 0, passes == 0))(alongside)
        if several:
            pl.loop(0, passes)(lambda index: take(index, fetch_rows(index), ends, alongside))
        elif idle:
            pl.when(passes > 0)(lambda: take(0, of_first, ends, alongside))
        else:
            take(0, of_first, ends, alongside)

    return start_prefetch, finish_outputs


def _fetch_rows(of_all, residual, first_row, n: int, *, rows: Rows) -> jax.Array:
    """Load, for each thread's row, the numbers in `of_all`, those of the second matrix, and tokens' residuals."""
    refs = [*of_all, *residual]
    count = rows.matrices * len(of_all) + sum(ref.shape[0] for ref in residual)

    @threads.on_threads(
        arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * len(refs)),
        return_type=threads.values(count, jnp.float32),
    )
    def start(_, first_row, *refs):
        row = (threads.splat_word(first_row) + threads.thread()).least(n - 1)
        found = [
            threads.load_real(ref, row + matrix * n)
            for matrix in range(rows.matrices)
            for ref in refs[: len(of_all)]
        ]
        for ref in refs[len(of_all) :]:
            found += [threads.load_real(ref, row + token * n) for token in range(threads.shape(ref)[0])]
        return threads.as_array(found)

    return start(first_row, *refs)


def _finish(
    partials_smem, ends, first_row, of_rows, outputs: RingOutputs, *, n: int, rows: Rows, wide: bool
) -> None:
    """Add up the warpgroups' sums, scale them and write them, each row by a thread; waits for the block before."""
    groups, t = partials_smem.shape[0], partials_smem.shape[2]
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
        tag, (partials, *refs) = more[: len(sent)], more[len(sent) :]
        stored, to = refs[: outputs.stored is not None], refs[outputs.stored is not None :]
        ends = threads.reals(ends)
        first, row = threads.splat_word(first_row), threads.thread()
        of_rows = threads.reals(of_rows)
        residuals = of_rows[3 * rows.matrices :]
        threads.barrier(128 * groups)

        def sum_of(token: int, matrix: int) -> Real:
            (scale, zero_point), (row_sum, bias, step) = ends[2 * token :][:2], of_rows[3 * matrix :][:3]
            at = threads.address(partials) + (row + matrix * rows.each) * 4
            shares = [
                threads.load(at, offset=4 * rows.count * (i * t + token))[0].real()
                for i in range(rows.shares * groups)
            ]
            product = step * functools.reduce(Real.__add__, shares)
            once = None if wide and token >= tokens else bias
            return rescale(product, scale, zero_point, row_sum, once)

        def total(token: int, matrix: int) -> Real:
            y = sum_of(token, matrix)
            return y + sum_of(tokens + token, matrix) if wide else y

        with threads.when(threads.both(row < rows.each, first + row < n)):
            for token in range(tokens):
                y = total(token, 0)
                if rows.matrices == 2:
                    y = silu_gate(y, total(token, 1))
                if residuals:  # round before, as two ops would
                    y = (y.to_bfloat16() if to else threads.rounded(y, stored[0])) + residuals[token]
                index = first + row + token * n
                for ref in to:
                    value = threads.pack_bfloat16(y, threads.real(0.0)) + threads.words(tag[0])[0]
                    threads.send(ref, index * 4, value)
                for ref in stored:
                    threads.store_real(ref, index, y)

    write(ends, first_row, of_rows, *sent, partials_smem, *refs)
