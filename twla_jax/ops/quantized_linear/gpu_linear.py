"""Computes one quantised linear inside a GPU kernel: norm, rotation, codes and product (Pallas Mosaic GPU).

Three kernels use it: `quantized_linear.gpu` is one linear, `linear_pair.gpu` two, and `qkv_attention.gpu` starts with
one. It works in two stages, `start_prefetch` and `finish_outputs`, so that a kernel can start the loads of its second
half before the first half is done.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.core.packing import TILE
from twla_jax.ops.attention.splits import AttentionSplits
from twla_jax.ops.hopper.limits import WARPGROUPS
from twla_jax.ops.quantized_linear import linear_tiles
from twla_jax.ops.rotate_quantize import gpu_codes, gpu_fetch, gpu_rotation
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul import gpu_ring
from twla_jax.ops.ternary_matmul.gpu_layout import Columns, Flat
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import MOST_ROWS, MOST_WARPGROUPS, RingTileConfig
from twla_jax.ops.ternary_matmul.weight import KernelWeight
from twla_jax.ops.tokens import quantizer_settings

MOST_TOKENS = 4  # more do not fit the registers: see `gpu_rotation.obstacle`


def obstacle(
    x: jax.Array | AttentionSplits,
    rotation: KernelRotation | None,
    weight: KernelWeight,
    *,
    gated: bool = False,
    wide: bool = False,
) -> str | None:
    """Return why the kernel cannot take such operands, or is slower than two ops; or None."""
    tokens = _tokens(x)
    t = tokens.shape[0]
    if rotation is None:
        return "there is no rotation"
    if tokens.dtype != jnp.bfloat16:
        return f"activations are {tokens.dtype}, not bfloat16"
    if isinstance(x, AttentionSplits) and x.head_dim % 8:
        return f"heads have {x.head_dim} features, not a multiple of 8"
    if not 1 <= t <= MOST_TOKENS:
        return f"there are {t} tokens, not 1 to {MOST_TOKENS}"
    if gated and len(weight.splits) != 2:
        return f"a gated linear needs two matrices, not {len(weight.splits)}"
    try:
        _, config = launch_plan(x, rotation, weight, gated=gated, wide=wide)
    except ValueError as error:
        return str(error)
    return gpu_rotation.obstacle(gpu_rotation.token_shape(x, rotation, config.warpgroups, wide=wide))


def launch_plan(
    x: jax.Array | AttentionSplits,
    rotation: KernelRotation,
    weight: KernelWeight,
    *,
    gated: bool = False,
    wide: bool = False,
    beside: int = 0,
) -> tuple[Rows, RingTileConfig]:
    """Return how the kernel is split up, with `beside` bytes of shared memory for other uses.

    Raises:
      ValueError: there is no room.
    """
    matrices = 2 if gated else 1
    lines = min(gpu_rotation.token_shape(x, rotation, MOST_WARPGROUPS).lines, MOST_WARPGROUPS)
    other, t = memory_beside_weights(x, rotation, weight, wide=wide) + beside, len(_tokens(x))
    config = linear_tiles.tile_config(
        weight.out_features // matrices, matrices, weight.column_tiles, lines, other, tokens=t
    )
    return Rows(config.rows, matrices), config


def memory_beside_weights(
    x: jax.Array | AttentionSplits, rotation: KernelRotation, weight: KernelWeight, *, wide: bool = False
) -> int:
    """Return the bytes of shared memory that everything but the ring of weights takes."""
    shape = gpu_rotation.token_shape(x, rotation, MOST_WARPGROUPS, wide=wide)
    flat, lines = Flat(shape.r), min(shape.lines, MOST_WARPGROUPS)
    of_row = 4 * max(WARPGROUPS, lines) * shape.codes  # of sums, of two passes
    return (
        max(
            2 * shape.tokens * shape.rows * shape.columns,
            shape.codes * flat.stride(weight.column_tiles * TILE),
        )
        + max(2 * shape.rows * shape.rows, 2 * of_row * MOST_ROWS)
        + 2 * shape.columns * shape.columns
        + 4 * Columns(shape.codes).numbers * (weight.column_tiles + 1)
        + 2048  # for small arrays and barriers
    )


def global_operands(
    inputs, rotation: KernelRotation, settings, weight: KernelWeight, norm
) -> tuple[jax.Array, ...]:
    """Return the global-memory operands of `linear_stages`, but for residuals and the output."""
    settings = quantizer_settings(8, 1.0) if settings is None else settings
    return (
        *gpu_ring.weight_operands(weight),
        rotation.left,
        rotation.right_transposed,
        settings,
        *inputs,
        *norm,
    )


def scratch_types(
    rows: Rows, config: RingTileConfig, shape: gpu_rotation.TokenShape, weight: KernelWeight
) -> dict[str, Any]:
    """Return the shared memory of `linear_stages`."""
    n = weight.out_features // rows.matrices
    return gpu_ring.scratch_types(rows, config, weight, tokens=shape.codes) | {
        # Tokens are no longer needed when their codes are written, nor L when sums are.
        "token_or_x_smem": plgpu.RefUnion(
            gpu_rotation.token_scratch(shape, jnp.bfloat16),
            gpu_ring.token_scratch(shape.codes, weight, Flat(shape.r)),
        ),
        "left_or_partials_smem": plgpu.RefUnion(
            gpu_rotation.left_scratch(shape, jnp.bfloat16),
            gpu_ring.partials_scratch(n, rows, config, tokens=shape.codes),
        ),
        "right_smem": gpu_rotation.right_scratch(shape, jnp.bfloat16),
        "warps_smem": gpu_rotation.warps_scratch(shape),
    }


def linear_stages(
    codes_gmem,
    scales_gmem,
    row_sums_gmem,
    bias_gmem,
    steps_gmem,
    left_gmem,
    right_gmem,
    settings_gmem,
    *refs,
    outputs: gpu_ring.RingOutputs,
    token_or_x_smem,
    left_or_partials_smem,
    right_smem,
    warps_smem,
    rows: Rows,
    config: RingTileConfig,
    shape: gpu_rotation.TokenShape,
    weight: KernelWeight,
    epsilon: float | None,
    received: tuple[Any, jax.Array] | None = None,
    ahead: int | None = None,
    of_all: int | None = None,
    **of_ring,
) -> tuple[Callable[[], None], Callable[..., None]]:
    """Start the loads of all operands of a linear but its weights, and return the two stages that follow.

    Args:
      codes_gmem: of the weight, as `gpu_ring.weight_operands` orders them, like the next four.
      scales_gmem: of the weight.
      row_sums_gmem: of the weight.
      bias_gmem: of the weight.
      steps_gmem: of the weight.
      left_gmem: L of the rotation.
      right_gmem: Rᵀ of the rotation.
      settings_gmem: of the quantiser.
      *refs: the input, then the norm's weights and the residual where there are any.
      outputs: where outputs go.
      token_or_x_smem: tokens, and in the same place their codes.
      left_or_partials_smem: L, and in the same place the warpgroups' sums.
      right_smem: Rᵀ.
      warps_smem: numbers that warps pass to each other.
      rows: the rows of a block.
      config: how the ring of weights is split up.
      shape: the tokens' shape.
      weight: whose codes these are.
      epsilon: of the norm; None for no norm.
      received: where tokens are sent to, and the tag that they have; None if they are among `refs`.
      ahead: how many places of the ring are filled before tokens are there; None for `config.ahead`.
      of_all: as `gpu_ring.product_stages` takes it.
      **of_ring: the rest of the ring's shared memory.

    Returns:
      start_prefetch: starts the loads of these first weights.
      finish_outputs: does all the rest; it takes `alongside`, as that of `gpu_ring.product_stages` does.
    """
    ahead = config.ahead if ahead is None else ahead
    count = 0 if received else 2 if shape.splits else 1
    x_gmem, optional = refs[:count], refs[count:]
    token_smem, x_smem = token_or_x_smem
    left_smem, partials_smem = left_or_partials_smem
    norm, residual = optional[: epsilon is not None], optional[epsilon is not None :]
    norm_gmem = norm[0] if norm else None
    asked, settings = gpu_fetch.prefetch_tokens(x_gmem, norm_gmem, settings_gmem, shape=shape)
    factors = gpu_fetch.prefetch_factors(left_gmem, right_gmem, shape=shape)
    levels = settings_gmem[0]
    prefetch_weights, finish_products = gpu_ring.product_stages(
        (codes_gmem, scales_gmem, row_sums_gmem, bias_gmem, steps_gmem),
        residual,
        outputs,
        x_smem=x_smem,
        partials_smem=partials_smem,
        rows=rows,
        config=config,
        weight=weight,
        flat=Flat(shape.r),
        wide=shape.wide,
        of_all=of_all,
        **of_ring,
    )

    def finish_outputs(**options):
        def answer() -> jax.Array:
            words = gpu_fetch.receive_tokens(asked, *received, shape=shape) if received else asked
            if received:
                prefetch_weights(ahead)
            words = gpu_fetch.prepare_tokens(words, levels, warps_smem, shape=shape, epsilon=epsilon)
            gpu_fetch.store_tokens(words, token_smem, shape=shape)
            gpu_fetch.store_factors(factors, left_smem, right_smem, shape=shape)
            gpu_fetch.synchronize(shape=shape)
            if not received:
                prefetch_weights(ahead)
            z = gpu_rotation.rotate(token_smem, right_smem, left_smem, shape=shape)
            memory = x_smem, of_ring["table_smem"], warps_smem
            return gpu_codes.quantize(z, settings, *memory, shape=shape, lie=Flat(shape.r))

        return finish_products(answer, **options)

    return functools.partial(prefetch_weights, 0, ahead), finish_outputs


def _tokens(x: jax.Array | AttentionSplits) -> jax.Array:
    return x.mixed if isinstance(x, AttentionSplits) else x
