"""Multiplies up to sixteen int8 tokens by two-bit weights on Hopper GPUs (Pallas Mosaic GPU), thread by thread.

Every block reads the tokens whole, through its threads into shared memory, and some rows of weights: see `gpu_ring`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8

from twla_jax.core.packing import PLANE, TILE
from twla_jax.ops.hopper import threads
from twla_jax.ops.ternary_matmul import few_tiles, gpu_ring
from twla_jax.ops.ternary_matmul.gpu_layout import COLUMNS, Columns, Flat
from twla_jax.ops.ternary_matmul.gpu_products import write_table
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig
from twla_jax.ops.ternary_matmul.weight import KernelWeight

_CHUNK = 16  # bytes that a thread reads at once
_FLAT = Flat(PLANE)
_MOST_TOKENS = 2 * COLUMNS


def obstacle(tokens: int, weight: KernelWeight) -> str | None:
    """Return why the kernel cannot take so many tokens, or None."""
    if tokens > _MOST_TOKENS:
        return f"there are {tokens} tokens, more than {_MOST_TOKENS}"
    try:
        launch_plan(tokens, weight)
    except ValueError as error:
        return str(error)
    return None


def launch_plan(tokens: int, weight: KernelWeight) -> RingTileConfig:
    """Return how the kernel is split up.

    Raises:
      ValueError: there is no room.
    """
    other = (
        tokens * _FLAT.stride(weight.column_tiles * TILE)
        + 4 * Columns(tokens).numbers * (weight.column_tiles + 1)
        + 2048  # for small arrays and barriers
    )
    return few_tiles.tile_config(weight.rows, weight.column_tiles, Columns(tokens).filled, other)


def matmul(
    x: Int8[Array, "t m"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    residual: Float[Array, "t n"] | None = None,
    *,
    out_dtype,
    config: RingTileConfig | None = None,
) -> Float[Array, "t n"]:
    """Return what `reference.matmul` computes, for int8 x, in the rows that are outputs, plus the residual."""
    t, n = len(x), weight.out_features
    added = [] if residual is None else [threads.readable(residual)]
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _CHUNK)))
    config = config or launch_plan(t, weight)
    rows = Rows(config.rows, 1)
    return plgpu.kernel(
        functools.partial(_kernel, rows=rows, config=config, weight=weight),
        out_type=jax.ShapeDtypeStruct((t, n), out_dtype),
        grid=(gpu_ring.block_count(n, rows),),
        grid_names=("rows",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        kernel_name="ternary_matmul_few",
        scratch_types=gpu_ring.scratch_types(rows, config, weight, tokens=t)
        | {
            "x_smem": gpu_ring.token_scratch(t, weight, _FLAT),
            "partials_smem": gpu_ring.partials_scratch(n, rows, config, tokens=t),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*gpu_ring.weight_operands(weight), x, scale, zero_point, *added)


def _kernel(*refs, rows: Rows, config: RingTileConfig, weight: KernelWeight, **memory):
    of_weight, (x_gmem, scale_gmem, zero_point_gmem, *residual, out_gmem) = refs[:5], refs[5:]
    count = 128 * config.warpgroups

    words, ends = _fetch_tokens(x_gmem, weight.column_tiles, count), _fetch_ends(scale_gmem, zero_point_gmem)
    outputs = gpu_ring.RingOutputs(stored=out_gmem)
    start_prefetch, finish_outputs = gpu_ring.product_stages(
        of_weight, residual, outputs, rows=rows, config=config, weight=weight, flat=_FLAT, **memory
    )

    def answer() -> jax.Array:
        _store_tokens(words, memory["x_smem"], memory["table_smem"], count)
        return ends

    start_prefetch()
    finish_outputs(answer)


def _chunks(t: int, tiles: int, count: int) -> int:
    """Return the number of chunks of 16 bytes that each of `count` threads reads."""
    return -(-t * tiles * (TILE // _CHUNK) // count)


def _fetch_tokens(x_gmem, tiles: int, count: int) -> jax.Array:
    """Start the loads of the tokens into the threads."""
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


def _fetch_ends(scale_gmem, zero_point_gmem) -> jax.Array:
    """Start the loads of every token's scale and zero point into each thread."""
    t = scale_gmem.shape[0]

    @threads.on_threads(arg_types=(plgpu.RefType(),) * 2, return_type=threads.values(2 * t, jnp.float32))
    def start(_, *refs):
        return threads.as_array([threads.load_real(ref, threads.word(i)) for i in range(t) for ref in refs])

    return start(scale_gmem, zero_point_gmem)


def _store_tokens(words, x_smem, table_smem, count: int) -> None:
    """Store the tokens' codes and their sums. Waits for the block.

    Codes are added up from shared memory: in flight, threads would wait for them before they prefetch weights.
    """
    t, each = x_smem.shape[0], (table_smem.shape[0] - 1) * (TILE // _CHUNK)

    @threads.on_threads(
        arg_types=(threads.per_thread(words.shape[0] // 128), plgpu.RefType(), plgpu.RefType())
    )
    def store(_, words, codes, table):
        found, me = threads.words(words), threads.thread()
        first, stride = threads.address(codes), threads.shape(codes)[1]
        for i in range(len(found) // 4):
            index = me + i * count
            token, chunk = index // each, index % each
            at = first + token * stride + _FLAT.place(chunk * _CHUNK)
            with threads.when(token < t):
                for k, word in enumerate(found[4 * i : 4 * i + 4]):
                    threads.store(at, word, offset=_CHUNK * k)
        threads.barrier(count)
        write_table(codes, table, _FLAT, count)
        threads.barrier(count)

    store(words, x_smem, table_smem)
