"""Norm, rotation, codes and product of a token or a few in one kernel on Hopper GPUs (Pallas Mosaic GPU).

A token's rotation takes one multiprocessor longer to wait for than to compute, and a kernel of its own as long again
to start. So every block computes it for itself, while its weights come from memory, as many of them under way as memory
needs and no more. Warpgroups share the columns, each with a ring of its own, and their sums meet in shared memory.
If all of a block's weights have room, they come in a few copies, as it takes a while to begin one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.decode_attention import AttentionParts
from twla_jax.ops.gpu_threads import Real
from twla_jax.ops.quantized_linear import gpu_codes, gpu_fetch
from twla_jax.ops.quantized_linear import gpu_products as products
from twla_jax.ops.quantized_linear import gpu_token as turning
from twla_jax.ops.quantized_linear import tiles as tuning
from twla_jax.ops.quantized_linear.gpu_products import Columns, Flat
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul.gpu_rows import PLANES, Rows, copy_tiles, tile_by_tile
from twla_jax.ops.ternary_matmul.tiles import STREAMING_MULTIPROCESSORS
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.packing import PLANE, TILE

MOST_TOKENS = 4  # beyond, registers end: see `gpu_token.obstacle`


def obstacle(
    x: jax.Array | AttentionParts,
    rotation: KernelRotation | None,
    weight: KernelWeight,
    *,
    gated: bool = False,
) -> str | None:
    """Why the kernel cannot take such operands, or is slower than two ops; or None."""
    tokens = _tokens(x)
    t = tokens.shape[0]
    if rotation is None:
        return "there is no rotation"
    if tokens.dtype != jnp.bfloat16:
        return f"activations are {tokens.dtype}, not bfloat16"
    if isinstance(x, AttentionParts) and x.head_dim % 8:
        return f"heads have {x.head_dim} features, not a multiple of 8"
    if not 1 <= t <= MOST_TOKENS:
        return f"there are {t} tokens, not 1 to {MOST_TOKENS}"
    if gated and len(weight.splits) != 2:
        return f"a gate and what it gates are two matrices, not {len(weight.splits)}"
    try:
        rows, tiles = plan(x, rotation, weight, gated=gated)
    except ValueError as error:
        return str(error)
    blocks = pl.cdiv(weight.out_features // rows.parts, rows.each)
    if t > 1 and blocks > STREAMING_MULTIPROCESSORS:
        # Each turns the tokens anew: two tokens at 57344×8192 took 68.8 µs, and two ops 58.6.
        return f"there are {blocks} blocks, more than {STREAMING_MULTIPROCESSORS}, for {t} tokens"
    return turning.obstacle(turning.shape(x, rotation, tiles.warpgroups))


def quantized_linear(
    x: Float[Array, "t m"] | AttentionParts,
    rotation: KernelRotation,
    settings: Float32[Array, " 3"],
    weight: KernelWeight,
    norm_scale: Float[Array, " m"] | None,
    residual: Float[Array, "t n"] | None,
    *,
    epsilon: float,
    out_dtype,
    gated: bool = False,
    tiles: tuning.Tiles | None = None,
) -> Float[Array, "t n"]:
    """What `reference.quantized_linear` computes, for a token in bf16 or up to `MOST_TOKENS`."""
    inputs = (x.mixed, x.softmax) if isinstance(x, AttentionParts) else (x,)
    t = len(inputs[0])
    rows, chosen = plan(x, rotation, weight, gated=gated)
    if tiles is not None:
        rows, chosen = Rows(tiles.rows, rows.parts), tiles
    groups = chosen.warpgroups
    shape = turning.shape(x, rotation, groups)
    n = weight.out_features // rows.parts
    norm = () if norm_scale is None else (threads.readable(norm_scale),)
    added = () if residual is None else (threads.readable(residual),)
    return plgpu.kernel(
        functools.partial(
            run,
            rows=rows,
            tiles=chosen,
            shape=shape,
            weight=weight,
            epsilon=epsilon if norm else None,
        ),
        out_type=jax.ShapeDtypeStruct((t, n), out_dtype),
        grid=(pl.cdiv(n, rows.each),),
        grid_names=("rows",),
        num_threads=groups,
        thread_name="warpgroup",
        scratch_types=memory(rows, chosen, shape, weight),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*operands(inputs, rotation, settings, weight, norm), *added)


def operands(inputs, rotation: KernelRotation, settings, weight: KernelWeight, norm) -> tuple[jax.Array, ...]:
    """What `run` has of global memory, but for residuals and the output."""
    of_weight = weight.codes, weight.gpu_scales, weight.row_sums, weight.bias, weight.steps
    return *of_weight, rotation.left, rotation.right_transposed, settings, *inputs, *norm


def memory(rows: Rows, tiles: tuning.Tiles, shape: turning.Shape, weight: KernelWeight) -> dict[str, Any]:
    """What `run` has of shared memory."""
    groups, stages, t = tiles.warpgroups, tiles.stages, shape.tokens
    return {
        "codes_smem": plgpu.SMEM(
            (groups, stages, rows.count, tiles.together * PLANE),
            jnp.uint8,
            transforms=tile_by_tile(rows.each, tiles.together),
        ),
        "scales_smem": plgpu.SMEM(
            (groups, stages, rows.parts, tiles.together, PLANES, rows.scales), jnp.int16
        ),
        # Tokens are used up when their codes are written, and L when sums are.
        "token_or_x_smem": plgpu.RefUnion(
            turning.token_memory(shape, jnp.bfloat16),
            plgpu.SMEM((t, Flat(shape.r).stride(weight.tiles * TILE)), jnp.int8),
        ),
        "table_smem": plgpu.SMEM((weight.tiles + 1, Columns(t).numbers), jnp.int32),
        "left_or_parts_smem": plgpu.RefUnion(
            turning.left_memory(shape, jnp.bfloat16),
            plgpu.SMEM((groups, rows.shares, t, rows.count), jnp.float32),
        ),
        "filled": plgpu.Barrier(
            num_arrivals=(2 if weight.grouped else 1) * rows.parts, num_barriers=groups * stages
        ),
        "right_smem": turning.right_memory(shape, jnp.bfloat16),
        "warps_smem": turning.warps_memory(shape),
    }


def _tokens(x: jax.Array | AttentionParts) -> jax.Array:
    return x.mixed if isinstance(x, AttentionParts) else x


def plan(
    x: jax.Array | AttentionParts,
    rotation: KernelRotation,
    weight: KernelWeight,
    *,
    gated: bool = False,
    beside: int = 0,
) -> tuple[Rows, tuning.Tiles]:
    """How the kernel is split up, with so many bytes of shared memory for others beside it.

    Raises:
      ValueError: there is no room.
    """
    parts = 2 if gated else 1
    shape = turning.shape(x, rotation, tuning.MOST_WARPGROUPS)
    t, flat = shape.tokens, Flat(shape.r)
    other = (
        t * max(2 * shape.rows * shape.columns, flat.stride(weight.tiles * TILE))
        + max(2 * shape.rows * shape.rows, 4 * tuning.MOST_WARPGROUPS * tuning.MOST_ROWS * t)
        + 2 * shape.columns * shape.columns
        + 4 * Columns(t).numbers * (weight.tiles + 1)
        + 2048  # for what is small
        + beside
    )
    lines = min(shape.lines, tuning.MOST_WARPGROUPS)
    tiles = tuning.tiles(weight.out_features // parts, parts, weight.tiles, lines, other, tokens=t)
    return Rows(tiles.rows, parts), tiles


def run(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    steps_gmem,
    left_gmem,
    right_gmem,
    settings_gmem,
    *refs,
    codes_smem,
    scales_smem,
    token_or_x_smem,
    table_smem,
    left_or_parts_smem,
    right_smem,
    warps_smem,
    filled,
    rows: Rows,
    tiles: tuning.Tiles,
    shape: turning.Shape,
    weight: KernelWeight,
    epsilon: float | None,
    tag: jax.Array | None = None,
    alongside: Callable[[], None] | None = None,
):
    """The kernel, or the first part of one whose second part waits for the outputs.

    Args:
      tag: of outputs that are sent: see `_finish`.
      alongside: what a warpgroup does when its last weights are there.
    """
    *inputs, out_gmem = refs
    count = 2 if shape.parts else 1
    x_gmem, optional = inputs[:count], inputs[count:]
    token_smem, x_smem = token_or_x_smem
    left_smem, parts_smem = left_or_parts_smem
    norm, residual = optional[: epsilon is not None], optional[epsilon is not None :]
    groups, stages, together = tiles.warpgroups, tiles.stages, tiles.together
    n = out_gmem.shape[1]
    group = lax.axis_index("warpgroup")
    first_row = lax.axis_index("rows") * rows.each
    if together > 1:  # neighbours
        own = pl.cdiv(weight.tiles, groups)
        first, distance, count = group * own, 1, jnp.maximum(jnp.minimum(weight.tiles - group * own, own), 0)
    else:
        first, distance, count = group, groups, lax.div(weight.tiles - group + groups - 1, groups)
    steps = lax.div(count + together - 1, together)

    def memory(slot):
        return codes_smem.at[group, slot], scales_smem.at[group, slot] if weight.grouped else None

    def fetch(step, slot):
        tile, barrier = first + step * together * distance, filled.at[group * stages + slot]
        source = codes_gmem, scales_gmem
        copy_tiles(source, memory(slot), barrier, tile, first_row, n, tiles=together, rows=rows)

    # The tokens before the weights, behind which they would queue up.
    words, settings = gpu_fetch.fetch(
        x_gmem, left_gmem, right_gmem, norm[0] if norm else None, settings_gmem, shape=shape
    )
    levels = settings_gmem[0]
    of_rows = _fetch_rows((row_sums_gmem, bias_gmem, steps_gmem), residual, first_row, n, rows=rows)
    for slot in range(stages):
        pl.when(slot < steps)(functools.partial(fetch, jnp.int32(slot), slot))
    words = gpu_fetch.ready(words, levels, warps_smem, shape=shape, epsilon=epsilon)
    gpu_fetch.load(words, token_smem, left_smem, right_smem, shape=shape)
    z = turning.turn(token_smem, right_smem, left_smem, shape=shape)
    ends = gpu_codes.quantize(z, settings, x_smem, table_smem, warps_smem, shape=shape)
    if alongside:
        pl.when(steps == 0)(alongside)

    def step(k, sums):
        slot = lax.rem(k, jnp.int32(stages))
        plgpu.barrier_wait(filled.at[group * stages + slot])
        if alongside:
            pl.when(k == steps - 1)(alongside)

        def add(place, sums):
            return products.add_tile(
                sums,
                *memory(slot),
                x_smem,
                table_smem,
                place,
                first + (k * together + place) * distance,
                rows=rows,
                flat=Flat(shape.r),
            )

        if together == 1:
            sums = add(jnp.int32(0), sums)
        else:
            sums = lax.fori_loop(0, jnp.minimum(together, count - k * together), add, sums)
        if stages * together * groups < weight.tiles:
            pl.when(k + stages < steps)(functools.partial(fetch, k + stages, slot))
        return sums

    sums = lax.fori_loop(0, steps, step, products.start(rows, shape.tokens, weight.grouped))
    of_all = None if weight.grouped else scales_gmem
    products.write_sums(sums, parts_smem.at[group], of_all, first_row, rows=rows, of_part=n)
    _finish(parts_smem, ends, first_row, of_rows, out_gmem, tag, rows=rows)


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


def _finish(parts_smem, ends, first_row, of_rows, out_gmem, tag=None, *, rows: Rows) -> None:
    """Adds up what warpgroups have, and scales and writes it, each row by a thread; waits for the block before.

    With a tag, which lies in the upper half of a word, outputs are sent: rounded to bf16, each below it.
    """
    groups, (t, n) = parts_smem.shape[0], out_gmem.shape
    tags = [] if tag is None else [tag]

    @threads.on_threads(
        arg_types=(
            *[plgpu.Layout.WG_SPLAT] * (2 * t + 1),
            threads.per_thread(of_rows.shape[0] // 128),
            *[threads.per_thread(1)] * len(tags),
            *[plgpu.RefType()] * 2,
        )
    )
    def write(_, *arguments):
        ends, (first_row, of_rows, *tag, parts, out) = arguments[: 2 * t], arguments[2 * t :]
        ends = [threads.splat_real(each) for each in ends]
        first, row = threads.splat_word(first_row), threads.thread()
        more = threads.reals(of_rows)
        residuals = more[3 * rows.parts :]
        threads.barrier(128 * groups)

        def total(token: int, part: int) -> Real:
            (scale, zero_point), (row_sum, bias, step) = ends[2 * token :][:2], more[3 * part :][:3]
            at = threads.address(parts) + (row + part * rows.each) * 4
            shares = [
                threads.load(at, offset=4 * rows.count * (i * t + token))[0].real()
                for i in range(rows.shares * groups)
            ]
            return scale * (step * functools.reduce(Real.__add__, shares) - zero_point * row_sum) + bias

        with threads.when(threads.both(row < rows.each, first + row < n)):
            for token in range(t):
                y = total(token, 0)
                if rows.parts == 2:
                    y = _gated(y, total(token, 1))
                if residuals:  # rounded before, as two ops would
                    y = threads.rounded(y, out) + residuals[token]
                index = first + row + token * n
                if tag:
                    value = threads.pack_bfloat16(y, threads.real(0.0)) + threads.words(tag[0])[0]
                    threads.send(out, index * 4, value)
                else:
                    threads.store_real(out, index, y)

    write(*(each for pair in ends for each in pair), first_row, of_rows, *tags, parts_smem, out_gmem)


def _gated(gate: Real, up: Real) -> Real:
    """`silu(gate) · up`, rounded to bf16 after every step, as XLA does it."""
    gate, up = gate.to_bfloat16(), up.to_bfloat16()
    small = threads.exponential(threads.real(0.0) - gate).to_bfloat16()
    sigmoid = (threads.real(1.0) / (small + 1.0).to_bfloat16()).to_bfloat16()
    return (gate * sigmoid).to_bfloat16() * up
