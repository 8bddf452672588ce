"""Ternary matmul: the reference against float64, the kernels against the reference, and what they compile to."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from twla_jax.bench import shapes
from twla_jax.core import tensors
from twla_jax.errors import TwlaError
from twla_jax.ops.ternary_matmul import (
    few_tiles,
    gpu,
    gpu_few,
    gpu_layout,
    gpu_ring,
    kernel_weight,
    reference,
    ring_tiles,
    ternary_matmul,
    tile_configs,
    tpu,
    tpu_unpack,
)
from twla_jax.ops.ternary_matmul.weight import fields_of_pair, pair
from twla_jax.ops.tokens import QuantizedTokens, group_sums

from helpers import emulated_threads
from helpers.ternary_operands import matrix, matrix_of_shape, operand_shapes, operands, packed, tokens

# rows, columns, group size: whole tiles, a short last tile, a short last group, groups of two planes, one group a row.
SHAPES = [(128, 1024, 128), (192, 576, 128), (130, 1000, 256), (64, 172, 128), (96, 576, 576)]
TPUS = ["v5e", "v6e", "v7x"]

# One program each; their operations would each be compiled for every shape.
by_reference = jax.jit(functools.partial(reference.matmul, out_dtype=jnp.float32))
by_tpu_kernel = jax.jit(functools.partial(tpu.matmul, out_dtype=jnp.float32, interpret=True))
by_xla = jax.jit(functools.partial(ternary_matmul, out_dtype=jnp.float32, implementation="xla"))
dense = jax.jit(tensors.dequantize)


def dequantized(x):
    codes, _, scale, zero_point = (np.asarray(part, np.float64) for part in operands(x))
    return scale[:, None] * (codes - zero_point[:, None])


def activations(kind, t, m):
    if kind == "int8":
        return tokens(t, m)
    return jax.device_put(np.random.default_rng(2).normal(size=(t, m)).astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize(("n", "m", "size"), SHAPES)
def test_reference_is_the_product_with_the_dequantised_matrix(n, m, size, kind):
    weight = matrix(n, m, size)
    bias = np.random.default_rng(1).normal(size=n).astype(np.float32)
    x = activations(kind, 3, m)
    y = by_xla(x, packed([weight], [bias]))
    expected = dequantized(x) @ np.asarray(dense(weight), np.float64).T + bias
    np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize(("n", "m", "size"), SHAPES)
def test_tpu_kernel_equals_the_reference(n, m, size, kind):
    weight = packed([matrix(n, m, size)])
    x = operands(activations(kind, 5, m))
    expected = by_reference(*x, weight)
    np.testing.assert_allclose(by_tpu_kernel(*x, weight), expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "size"), [("int8", 128), ("int8", 576), ("bfloat16", 128)])
def test_tpu_kernel_of_many_tokens_equals_the_reference(kind, size):
    weight = packed([matrix(192, 576, size)], [np.linspace(-1, 1, 192, dtype=np.float32)])
    x = operands(activations(kind, tile_configs.TPU_FEW_TOKENS + 40, 576))
    expected = by_reference(*x, weight)
    # Weights of bf16 are whole numbers, which it holds; the sums of float tokens are rounded in another order.
    np.testing.assert_allclose(by_tpu_kernel(*x, weight), expected, atol=2e-6 * np.abs(expected).max())


def test_two_planes_at_once_are_the_same_as_one(monkeypatch):
    weight = packed([matrix(128, 1024, 128)])
    x = operands(tokens(5, 1024))
    expected = by_tpu_kernel(*x, weight)
    monkeypatch.setattr(tpu_unpack, "planes_together", lambda: 2)
    found = jax.jit(functools.partial(tpu.matmul, out_dtype=jnp.float32, interpret=True))(*x, weight)
    np.testing.assert_array_equal(found, expected)


def test_blocks_of_many_tokens_fit_memory():
    for config in shapes.SHAPES.values():
        for n, m in shapes.matrices(config).values():
            columns, rows = -(-m // 512) * 512, -(-n // 128) * 128
            for t, size in itertools.product((257, 300, 2048, 5000), (1, 2)):
                tile = tile_configs.tpu_tile_config(t, rows, columns, size, many=True)
                assert rows % tile.rows == 0
                blocks = -(-t // tile.tokens)
                assert blocks * tile.tokens - t < 128 * blocks
                x, weights = tile.tokens * columns * size, 2 * tile.rows * columns
                codes, out = tile.rows * (columns // 4 + columns // 64), 4 * tile.tokens * tile.rows
                assert min(blocks, 2) * x + 2 * (codes + out) + weights <= tile_configs.TPU_MEMORY


def test_scales_are_the_same_as_their_bits():
    weight = packed([matrix(192, 576, 576)])
    assert weight.scales.dtype == jnp.float16
    bits = dataclasses.replace(weight, scales=weight.scale_bits)
    assert bits.scales.dtype == jnp.int16
    x = operands(tokens(5, 576))
    for op in (by_reference, by_tpu_kernel):
        np.testing.assert_array_equal(op(*x, bits), op(*x, weight))


@pytest.mark.parametrize("size", [128, 1536])
def test_accumulators_are_exact(size):
    # α = μ leaves the sum over U = T + 1, an integer, and of 63 a step is 1.
    weight = matrix(128, 1536, size, alpha=63, mu=63)
    x = tokens(4, 1536)
    x = (x.codes, x.sums, jnp.ones(4), jnp.zeros(4))
    exact = np.asarray(x[0], np.int64) @ (np.asarray(dense(weight), np.int64)).T
    for op in (by_reference, by_tpu_kernel):
        np.testing.assert_array_equal(op(*x, packed([weight])), exact)


@pytest.mark.parametrize(
    ("t", "n", "m", "size", "rows", "warpgroups", "stages"),
    [
        (2, 256, 1536, 128, 40, 2, 1),  # seven blocks' rows on four multiprocessors take two passes
        (1, 128, 1024, 128, 32, 2, 1),
        (8, 128, 2000, 128, 88, 4, 1),
        (3, 128, 1536, 128, 96, 1, 2),
        (5, 128, 1040, 1040, 128, 2, 1),
        (8, 128, 1536, 1536, 32, 2, 2),
        (8, 512, 2048, 128, 40, 2, 2),
        (4, 512, 512, 512, 40, 2, 1),  # one warpgroup has no tile
        (16, 128, 1024, 128, 72, 2, 1),
        (11, 512, 1040, 1040, 32, 2, 2),
        (1, 256, 3072, 128, 168, 2, (2, 2)),
    ],
)
def test_gpu_kernel_of_few_tokens_thread_by_thread(t, n, m, size, rows, warpgroups, stages, monkeypatch):
    weight = packed([matrix(n, m, size)], [np.linspace(-1, 1, n, dtype=np.float32)])
    codes, sums, scale, zero_point = operands(tokens(t, m))
    residual = None if t % 2 else jnp.asarray(np.random.default_rng(0).normal(size=(t, n)), jnp.float32)
    expected = by_reference(codes, sums, scale, zero_point, weight, residual)
    emulated_threads.emulate(monkeypatch)
    emulated_threads.emulate_kernel(monkeypatch, pl)
    stages, together = stages if isinstance(stages, tuple) else (stages, 1)
    chosen = ring_tiles.RingTileConfig(rows=rows, warpgroups=warpgroups, stages=stages, together=together)
    monkeypatch.setattr(gpu_ring, "STREAMING_MULTIPROCESSORS", 4)
    found = gpu_few.matmul(codes, scale, zero_point, weight, residual, out_dtype=jnp.float32, config=chosen)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("code", [-128, 127])
def test_sums_of_a_group_fit_16_bits_at_their_largest(code, monkeypatch):
    weight = tensors.from_codes(jnp.ones((32, 1024), jnp.int8), *jnp.full((2, 32, 8), 63.0), 128)
    x = jnp.full((1, 1024), code, jnp.int8)
    emulated_threads.emulate(monkeypatch)
    emulated_threads.emulate_kernel(monkeypatch, pl)
    chosen = ring_tiles.RingTileConfig(rows=32, warpgroups=2, stages=1)
    ends = jnp.ones(1), jnp.zeros(1)
    found = gpu_few.matmul(x, *ends, packed([weight]), out_dtype=jnp.float32, config=chosen)
    np.testing.assert_array_equal(found[:, :32], 126 * 1024 * code)


def test_a_pair_holds_every_two_bytes():
    alpha, mu = np.mgrid[-128:128, -128:128]
    pairs = pair(jnp.asarray(alpha), jnp.asarray(mu))
    assert pairs.dtype == jnp.int16
    found = fields_of_pair(pairs.astype(jnp.int32))
    np.testing.assert_array_equal(found, (alpha, mu))


def test_what_no_quantiser_made_is_rounded_to_half_a_step():
    rng = np.random.default_rng(0)
    alpha, mu = rng.normal(size=(2, 64, 8)).astype(np.float16)
    codes = rng.integers(-1, 2, (64, 1024))
    weight = tensors.from_codes(jnp.asarray(codes, jnp.int8), jnp.asarray(alpha), jnp.asarray(mu), 128)
    kernels = packed([weight])
    eye = jnp.eye(1024, dtype=jnp.float32)
    found = np.asarray(by_xla(eye, kernels)).T
    largest = np.max(np.abs(alpha) + np.abs(mu), axis=1, keepdims=True)
    assert (kernels.steps[:64, None] <= largest / 126 * (1 + 1 / 8)).all()  # four bits of it
    off = np.abs(found - np.asarray(tensors.dequantize(weight)))
    assert (off <= (1 + 1e-3) * kernels.steps[:64, None]).all()  # half of it α, half μ
    np.testing.assert_allclose(kernels.row_sums[:64], found.sum(1), atol=1e-4 * np.abs(found).sum(1).max())


def test_scales_of_every_size_survive_the_way_through_their_bits():
    # The TPU kernel reads float16 as integers: normal, subnormal and negative ones, and both zeros.
    values = jnp.array([1.0, -2.5, 65504, 6.1e-5, 5.96e-8, -3e-6, 0.0, -0.0], jnp.float16)
    weight = kernel_weight(
        [tensors.from_codes(jnp.ones((8, 128), jnp.int8), values[:, None], values[:, None], 128)]
    )
    x = jnp.zeros((1, 128), jnp.int8).at[0, 0].set(1)
    args = (x, group_sums(x), jnp.ones(1), jnp.zeros(1), weight)
    y = by_tpu_kernel(*args)[0, :8]
    np.testing.assert_array_equal(y, 2 * values.astype(np.float32))


def test_a_residual_is_added_to_rounded_outputs():
    weight, x = packed([matrix(130, 1000, 256)]), tokens(6, 1000)
    residual = jax.random.normal(jax.random.key(0), (6, 130), jnp.bfloat16)
    expected = residual + ternary_matmul(x, weight)
    np.testing.assert_array_equal(ternary_matmul(x, weight, residual), expected)


def test_tiles_of_few_tokens_fit_memory():
    published = {
        (n, -(-m // 512)) for config in shapes.SHAPES.values() for n, m in shapes.matrices(config).values()
    }
    assert {shape[:2] for shape in few_tiles.TUNED} <= published
    odd = {(64, 1), (576, 3), (152064, 8)}
    for (rows, columns), t in itertools.product(sorted(published | odd), (1, 2, 3, 8, 13)):
        filled = gpu_layout.Columns(t).filled
        other = t * gpu_layout.Flat(128).stride(512 * columns)
        if t * columns > (8 * 24 if t <= 8 else 16 * 8):
            continue
        chosen = few_tiles.tile_config(rows, columns, filled, other)
        assert chosen.rows % 8 == 0
        passes = -(-rows // (132 * chosen.rows))
        assert chosen.stages * chosen.together <= passes * -(-columns // chosen.warpgroups)
        used = chosen.warpgroups * chosen.stages * chosen.together * ring_tiles.tile_bytes(chosen.rows)
        parts = min(passes, 2) * chosen.warpgroups * (2 if chosen.rows <= 32 else 1) * 4 * t * chosen.rows
        assert used + other + parts <= 226 * 1024
        assert used >= min(40 * 1024, columns * ring_tiles.tile_bytes(chosen.rows))
    with pytest.raises(ValueError, match="leave no room"):
        few_tiles.tile_config(8192, 56, 8, 8 * gpu_layout.Flat(128).stride(512 * 56))


def test_matrices_that_share_an_input_are_one_product():
    parts = [matrix(n, 576, 128, seed=n) for n in (64, 32, 32)]
    x = tokens(2, 576)
    together = by_xla(x, packed(parts))
    apart = [by_xla(x, packed([part])) for part in parts]
    np.testing.assert_allclose(together, jnp.concatenate(apart, axis=1), rtol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(12288, 4096), (22016, 4096), (4096, 11008), (10240, 8192)])
def test_weights_take_at_most_2_4_bits(n, m):
    weight = jax.eval_shape(lambda: kernel_weight([matrix_of_shape(n, m, 128)]))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    assert size * 8 <= 2.4 * n * m


def test_group_sizes_without_a_place_are_refused():
    with pytest.raises(TwlaError, match="group size 64"):
        kernel_weight([matrix(8, 256, 64)])


def test_kernels_leave_float32_activations_to_the_reference():
    x, weight = jnp.full((1, 128), 1 + 2.0**-12), kernel_weight([matrix(8, 128, 128)])
    with pytest.raises(TwlaError, match="float32, not bfloat16"):
        ternary_matmul(x, weight, implementation="tpu")
    one = ternary_matmul(jnp.ones((1, 128)), weight, out_dtype=jnp.float32)
    # Rounded to bf16, the two would be equal.
    np.testing.assert_allclose(
        ternary_matmul(x, weight, out_dtype=jnp.float32), one * x[0, 0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize(("t", "n", "m", "size"), [(1, 4096, 4096, 128), (300, 960, 576, 576)])
@pytest.mark.parametrize("target", TPUS)
def test_tpu_kernel_compiles(target, t, n, m, size, dtype, compile_for):
    function = functools.partial(tpu.matmul, out_dtype=jnp.bfloat16)
    compiled = compile_for(target, function, *operand_shapes(t, n, m, size, dtype))
    # Padded activations, and no copy of the weights larger than they are.
    assert compiled.memory_analysis().temp_size_in_bytes < n * m // 4


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize(
    ("t", "n", "m", "size"),
    [
        (1, 4096, 4096, 128),
        (8, 22016, 4096, 128),
        (8, 22016, 4096, 4096),
        (8, 4096, 11008, 128),
        (8, 57344, 8192, 128),
        (2, 3584, 18944, 128),
        (16, 12288, 4096, 128),
        (16, 22016, 4096, 4096),
        (16, 4096, 11008, 128),
        (24, 960, 576, 128),
    ],
)
def test_gpu_kernel_spills_nothing_and_copies_no_weights(t, n, m, size, dtype, compile_for_h100):
    function = functools.partial(gpu.matmul, out_dtype=jnp.bfloat16)
    compiled, reports = compile_for_h100(function, *operand_shapes(t, n, m, size, dtype))
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
    assert compiled.memory_analysis().temp_size_in_bytes < n * m // 4


@pytest.mark.hlo
@pytest.mark.aot
@pytest.mark.parametrize(("target", "call"), [("h100", "mosaic_gpu"), ("v6e", "tpu_custom_call")])
def test_the_platform_picks_its_kernel(target, call, compile_for):
    codes, sums, scale, zero_point, weight = operand_shapes(8, 4096, 4096, 128, jnp.int8)
    x = QuantizedTokens(codes=codes, sums=sums, scale=scale, zero_point=zero_point)
    assert call in compile_for(target, ternary_matmul, x, weight).as_text()
