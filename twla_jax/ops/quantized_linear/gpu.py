"""Norm, rotation, codes and product of a token or a few in one kernel on Hopper GPUs (Pallas Mosaic GPU).

A token's rotation takes one multiprocessor longer to wait for than to compute, and a kernel of its own as long again
to start. So every block computes it for itself, while its weights come from memory: see `ternary_matmul.gpu_ring`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.core.packing import TILE
from twla_jax.ops.decode_attention import AttentionParts
from twla_jax.ops.hopper import threads as threads
from twla_jax.ops.quantized_linear import tile_configs as tuning
from twla_jax.ops.rotate_quantize import gpu_codes, gpu_fetch
from twla_jax.ops.rotate_quantize import gpu_token as turning
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul import gpu_ring as ring
from twla_jax.ops.ternary_matmul.gpu_products import Columns, Flat
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import MOST_ROWS, MOST_WARPGROUPS, WARPGROUPS, Tiles
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import quantizer_settings

MOST_TOKENS = 4  # beyond, registers end: see `gpu_token.obstacle`


def obstacle(
    x: jax.Array | AttentionParts,
    rotation: KernelRotation | None,
    weight: KernelWeight,
    *,
    gated: bool = False,
    wide: bool = False,
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
        _, tiles = plan(x, rotation, weight, gated=gated, wide=wide)
    except ValueError as error:
        return str(error)
    return turning.obstacle(turning.shape(x, rotation, tiles.warpgroups, wide=wide))


def quantized_linear(
    x: Float[Array, "t m"] | AttentionParts,
    rotation: KernelRotation,
    settings: Float32[Array, " 3"] | None,
    weight: KernelWeight,
    norm_scale: Float[Array, " m"] | None,
    residual: Float[Array, "t n"] | None,
    *,
    epsilon: float,
    out_dtype,
    gated: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "t n"]:
    """What `reference.quantized_linear` computes, for a token in bf16 or up to `MOST_TOKENS`."""
    inputs = (x.mixed, x.softmax) if isinstance(x, AttentionParts) else (x,)
    t = len(inputs[0])
    wide = settings is None
    rows, chosen = plan(x, rotation, weight, gated=gated, wide=wide)
    if tiles is not None:
        rows, chosen = Rows(tiles.rows, rows.parts), tiles
    groups = chosen.warpgroups
    shape = turning.shape(x, rotation, groups, wide=wide)
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
        grid=(ring.blocks(n, rows),),
        grid_names=("rows",),
        num_threads=groups,
        thread_name="warpgroup",
        kernel_name="quantized_linear",
        scratch_types=memory(rows, chosen, shape, weight),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*operands(inputs, rotation, settings, weight, norm), *added)


def operands(inputs, rotation: KernelRotation, settings, weight: KernelWeight, norm) -> tuple[jax.Array, ...]:
    """What `begin` has of global memory, but for residuals and the output."""
    settings = quantizer_settings(8, 1.0) if settings is None else settings
    return *ring.operands(weight), rotation.left, rotation.right_transposed, settings, *inputs, *norm


def memory(rows: Rows, tiles: Tiles, shape: turning.Shape, weight: KernelWeight) -> dict[str, Any]:
    """What `begin` has of shared memory."""
    n = weight.out_features // rows.parts
    return ring.memory(rows, tiles, weight, tokens=shape.codes) | {
        # Tokens are used up when their codes are written, and L when sums are.
        "token_or_x_smem": plgpu.RefUnion(
            turning.token_memory(shape, jnp.bfloat16),
            ring.token_memory(shape.codes, weight, Flat(shape.r)),
        ),
        "left_or_parts_smem": plgpu.RefUnion(
            turning.left_memory(shape, jnp.bfloat16),
            ring.parts_memory(n, rows, tiles, tokens=shape.codes),
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
    wide: bool = False,
    beside: int = 0,
) -> tuple[Rows, Tiles]:
    """How the kernel is split up, with so many bytes of shared memory for others beside it.

    Raises:
      ValueError: there is no room.
    """
    parts = 2 if gated else 1
    lines = min(turning.shape(x, rotation, MOST_WARPGROUPS).lines, MOST_WARPGROUPS)
    other, t = beside_weights(x, rotation, weight, wide=wide) + beside, len(_tokens(x))
    tiles = tuning.tiles(weight.out_features // parts, parts, weight.tiles, lines, other, tokens=t)
    return Rows(tiles.rows, parts), tiles


def beside_weights(
    x: jax.Array | AttentionParts, rotation: KernelRotation, weight: KernelWeight, *, wide: bool = False
) -> int:
    """Bytes of shared memory that all takes but the ring of weights."""
    shape = turning.shape(x, rotation, MOST_WARPGROUPS, wide=wide)
    flat, lines = Flat(shape.r), min(shape.lines, MOST_WARPGROUPS)
    of_row = 4 * max(WARPGROUPS, lines) * shape.codes  # of sums, of two passes
    return (
        max(2 * shape.tokens * shape.rows * shape.columns, shape.codes * flat.stride(weight.tiles * TILE))
        + max(2 * shape.rows * shape.rows, 2 * of_row * MOST_ROWS)
        + 2 * shape.columns * shape.columns
        + 4 * Columns(shape.codes).numbers * (weight.tiles + 1)
        + 2048  # for what is small
    )


def run(*refs, **options):
    """The kernel."""
    *given, out_gmem = refs
    start, end = begin(*given, outputs=ring.Outputs(stored=out_gmem), **options)
    start()
    end()


def begin(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    steps_gmem,
    left_gmem,
    right_gmem,
    settings_gmem,
    *refs,
    outputs: ring.Outputs,
    token_or_x_smem,
    left_or_parts_smem,
    right_smem,
    warps_smem,
    rows: Rows,
    tiles: Tiles,
    shape: turning.Shape,
    weight: KernelWeight,
    epsilon: float | None,
    received: tuple[Any, jax.Array] | None = None,
    ahead: int | None = None,
    of_all: int | None = None,
    **of_ring,
) -> tuple[Callable[[], None], Callable[..., None]]:
    """Asks for all that a linear has but its weights, and returns what goes on with it.

    Args:
      received: where tokens are sent to, and the tag that they have; None if they are among `refs`.
      ahead: how many of its ring's places are to be filled before tokens are there; None for `tiles.ahead`.
      of_all: as `gpu_ring.begin` takes it.
    Returns:
      start: starts the way of these first weights.
      end: all the rest; it takes `alongside` as `gpu_ring.begin`'s does.
    """
    ahead = tiles.ahead if ahead is None else ahead
    count = 0 if received else 2 if shape.parts else 1
    x_gmem, optional = refs[:count], refs[count:]
    token_smem, x_smem = token_or_x_smem
    left_smem, parts_smem = left_or_parts_smem
    norm, residual = optional[: epsilon is not None], optional[epsilon is not None :]
    norm_gmem = norm[0] if norm else None
    asked, settings = gpu_fetch.fetch(x_gmem, norm_gmem, settings_gmem, shape=shape)
    factors = gpu_fetch.fetch_factors(left_gmem, right_gmem, shape=shape)
    levels = settings_gmem[0]
    fetch, end_ring = ring.begin(
        (codes_gmem, scales_gmem, row_sums_gmem, bias_gmem, steps_gmem),
        residual,
        outputs,
        x_smem=x_smem,
        parts_smem=parts_smem,
        rows=rows,
        tiles=tiles,
        weight=weight,
        flat=Flat(shape.r),
        wide=shape.wide,
        of_all=of_all,
        **of_ring,
    )

    def end(**options):
        def answer() -> jax.Array:
            words = gpu_fetch.receive(asked, *received, shape=shape) if received else asked
            if received:
                fetch(ahead)
            words = gpu_fetch.ready(words, levels, warps_smem, shape=shape, epsilon=epsilon)
            gpu_fetch.load(words, token_smem, shape=shape)
            gpu_fetch.load_factors(factors, left_smem, right_smem, shape=shape)
            gpu_fetch.meet(shape=shape)
            if not received:
                fetch(ahead)
            z = turning.turn(token_smem, right_smem, left_smem, shape=shape)
            memory = x_smem, of_ring["table_smem"], warps_smem
            return gpu_codes.quantize(z, settings, *memory, shape=shape, lie=Flat(shape.r))

        return end_ring(answer, **options)

    return functools.partial(fetch, 0, ahead), end
