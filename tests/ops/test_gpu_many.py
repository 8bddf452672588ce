"""The GPU kernel of many tokens: warpgroup by warpgroup against the reference, and what it compiles to."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.bench import shapes
from twla_jax.core import tensors
from twla_jax.ops.integer_matmul import integer_matmul, integer_weight
from twla_jax.ops.ternary_matmul import (
    gpu,
    gpu_many,
    gpu_many_blocks,
    gpu_many_floats,
    gpu_many_outputs,
    gpu_many_rings,
    reference,
    tile_configs,
)
from twla_jax.ops.ternary_matmul.weight import fields_of_pair
from twla_jax.ops.tokens import group_sums

from helpers import emulated_warpgroups
from helpers.ternary_operands import matrix, operand_shapes, operands, packed, tokens


@pytest.mark.parametrize(
    ("t", "n", "m", "size", "block_tokens", "lines", "x_planes"),
    [
        (100, 384, 1536, 128, 32, 1, 1),
        (40, 256, 1024, 1024, 64, 1, 4),
        (20, 200, 576, 128, 16, 1, 2),
        (100, 384, 1536, 128, 32, 2, 4),
        (40, 256, 1024, 1024, 64, 2, 1),
        (20, 200, 400, 128, 16, 2, 2),  # one line has no tile
    ],
)
def test_equals_the_reference_warpgroup_by_warpgroup(
    t, n, m, size, block_tokens, lines, x_planes, monkeypatch
):
    # α and μ are whole 64ths, so that the steps to which the kernel rounds weights lose nothing.
    rng = np.random.default_rng(0)
    shape = (n, -(-m // size))
    alpha, mu = (jnp.asarray(rng.integers(-limit, limit + 1, shape) / 64) for limit in (40, 20))
    alpha, mu = alpha.at[:, 0].set(43 / 64), mu.at[:, 0].set(20 / 64)
    codes = jnp.asarray(rng.integers(-1, 2, (n, m)), jnp.int8)
    weight = packed([tensors.from_codes(codes, alpha, mu, size)])
    arguments = operands(tokens(t, m))
    expected = jax.jit(functools.partial(reference.matmul, out_dtype=jnp.float32))(*arguments, weight)
    emulate_warpgroups(monkeypatch)
    # Few slots, refilled again and again.
    x_slots = {1: 3, 2: 2, 4: 1}[x_planes]
    chosen = tile_configs.ManyTileConfig(
        tokens=block_tokens, lines=lines, cluster=2, stages=2, x_slots=x_slots, x_planes=x_planes
    )
    found = gpu_many.matmul(*arguments, weight, out_dtype=jnp.float32, config=chosen)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("t", "n", "m", "block", "x_slots"),
    [(40, 700, 3000, 64, 1), (64, 640, 2600, 64, 2), (16, 640, 2600, 16, 4), (64, 200, 512, 64, 2)],
)
def test_blocks_of_a_cluster_share_columns(t, n, m, block, x_slots, monkeypatch):
    weight, arguments = packed([matrix(n, m, 128)]), operands(tokens(t, m))
    residual = jax.random.normal(jax.random.key(0), (t, n), jnp.bfloat16)
    emulate_warpgroups(monkeypatch)
    sizes = {"tokens": block, "stages": 2, "x_slots": x_slots, "x_planes": 4}
    plain = tile_configs.ManyTileConfig(lines=1, cluster=1, **sizes)
    chosen = tile_configs.ManyTileConfig(lines=2, cluster=2, split=True, **sizes)
    expected, found = (
        gpu_many.matmul(*arguments, weight, residual, out_dtype=jnp.bfloat16, config=config)
        for config in (plain, chosen)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("t", [16, 5])
def test_adds_both_parts_of_wide_tokens(t, monkeypatch):
    n, m = 256, 600
    weight, (x, _, scale, zero_point) = packed([matrix(n, m, 128)]), operands(tokens(2 * t, m))
    residual = jax.random.normal(jax.random.key(0), (t, n))
    operands_of = x, group_sums(x), scale, zero_point
    expected = reference.matmul(*operands_of, weight, out_dtype=jnp.float32)
    expected = residual + (expected.reshape(2, t, n).sum(0) - weight.bias)
    emulate_warpgroups(monkeypatch)
    found = gpu_many.matmul(*operands_of, weight, residual, out_dtype=jnp.float32, wide=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("x_planes", [1, 2])
def test_codes_of_four_bits_times_floats(x_planes, monkeypatch):
    t, n, m, groups = 20, 300, 1000, 8
    rng = np.random.default_rng(0)
    tensor = tensors.IntegerTensor(
        codes=rng.integers(0, 16, (n, m)).astype(np.uint8),
        scale=(0.1 + rng.random((n, groups))).astype(np.float16),
        zero_point=rng.integers(0, 16, (n, groups)).astype(np.uint8),
        in_features=m,
        group_size=128,
        bits=4,
    )
    x = jnp.asarray(rng.normal(size=(t, m)), jnp.bfloat16)
    expected = np.float64(x) @ np.float64(tensor.dequantize()).T
    weight = jax.jit(integer_weight)(tensor)
    emulate_warpgroups(monkeypatch)
    chosen = tile_configs.ManyTileConfig(
        tokens=16, lines=1, cluster=2, stages=2, x_slots=3, x_planes=x_planes
    )
    found = gpu_many_floats.product(x, weight, out_dtype=jnp.float32, config=chosen)
    np.testing.assert_allclose(found[:, :n], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("lines", [1, 2])
def test_adds_a_residual(lines, monkeypatch):
    t, n, m = 200, 256, 600
    weight, arguments = packed([matrix(n, m, 128)]), operands(tokens(t, m))
    residual = jax.random.normal(jax.random.key(0), (t, n), jnp.bfloat16) * 1e4
    options = {"out_dtype": jnp.bfloat16}
    expected = reference.matmul(*arguments, weight, residual, **options).astype(jnp.float32)
    emulate_warpgroups(monkeypatch)
    # A block writes its outputs in three pieces.
    chosen = tile_configs.ManyTileConfig(tokens=192, lines=lines, cluster=1, stages=2, x_slots=2, x_planes=2)
    found = gpu_many.matmul(*arguments, weight, residual, **options, config=chosen)
    # Sums are rounded on one side or the other of an edge.
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0, atol=np.abs(expected).max() / 128)
    assert (found == expected).mean() > 0.99


def emulate_warpgroups(monkeypatch):
    emulated_warpgroups.emulate(monkeypatch, pl, plgpu)
    monkeypatch.setattr(gpu_many_rings, "unpack_rows", unpacked_rows)
    monkeypatch.setattr(gpu_many_rings, "unpack_weights", unpacked_weights)
    monkeypatch.setattr(gpu_many_floats, "unpack_floats", unpacked_floats)
    monkeypatch.setattr(gpu_many_floats, "unpacked_order", lambda x: x)
    monkeypatch.setattr(gpu_many_blocks, "send", send)
    monkeypatch.setattr(gpu_many_blocks, "received", received)
    monkeypatch.setattr(gpu_many_rings, "CLUSTERS", {1: 4, 2: 2})  # with several outputs each


def send(own, sums):
    sums.arrays[0][...] = np.asarray(own).ravel()


def received(sums, shape):
    return np.array(sums.array).reshape(shape)  # a copy: JAX may read it when the next ones are there


def unpacked_floats(packed, plane, offsets):
    return (np.asarray(packed) >> 4 * plane & 15).astype(np.float32) - np.asarray(offsets)[:, None]


def unpacked_rows(packed, plane, *, exact, wide):
    assert exact
    assert wide
    return (np.asarray(packed) >> 2 * plane & 3).astype(np.int8), 1


def unpacked_weights(packed, plane, pairs):
    unsigned = (np.asarray(packed) >> 2 * plane & 3).astype(int)
    alpha, mu = (np.asarray(part)[:, None] for part in fields_of_pair(pairs))
    return alpha * unsigned + mu


def test_tiles_fit_memory():
    weight = packed([matrix(128, 512, 128)])
    rows = (640, 1024, 4096, 8192, 10240, 12288, 22016, 57344)
    for n, t, out_dtype in itertools.product(
        rows, (17, 33, 64, 65, 96, 128, 129, 300, 2048), (jnp.bfloat16, jnp.float32)
    ):
        chosen = tile_configs.many_tile_config(t, n, jnp.dtype(out_dtype).itemsize)
        assert chosen.tokens >= min(t, 128)
        work = gpu_many_rings.ManyWork(tokens=t, weight_rows=n, config=chosen)
        memory = (
            gpu_many_rings.scratch_types(work, weight),
            gpu_many_outputs.scratch_types(work, out_dtype, grouped=True),
            gpu_many.line_scratch_types(chosen),
            gpu_many_blocks.scratch_types(chosen),
        )
        kinds = [kind for part in memory for kind in part.values()]
        arrays = [kind for kind in kinds if not isinstance(kind, plgpu.Barrier | plgpu.ClusterBarrier)]
        assert sum(np.prod(kind.shape) * np.dtype(kind.dtype).itemsize for kind in arrays) <= 226 * 1024


@pytest.mark.hlo
@pytest.mark.aot
@pytest.mark.parametrize("t", [24, 128, 2048])
def test_adds_a_residual_itself(t, compile_for_h100):
    operands = *operand_shapes(t, 4096, 4096, 128, jnp.int8), jax.ShapeDtypeStruct((t, 4096), jnp.bfloat16)
    compiled, reports = compile_for_h100(functools.partial(gpu.matmul, out_dtype=jnp.bfloat16), *operands)
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
    assert "fusion" not in compiled.as_text()


@pytest.mark.aot
def test_a_head_of_four_bits_spills_nothing(compile_for_h100):
    weight = jax.eval_shape(lambda key: shapes.head(key, 2048, 4096, 4), jax.random.key(0))
    head = functools.partial(integer_matmul, out_dtype=jnp.float32, implementation="gpu")
    _, reports = compile_for_h100(head, jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16), weight)
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("t", "n", "m", "size", "out_dtype"),
    [
        (2048, 12288, 4096, 4096, jnp.bfloat16),
        (2048, 4096, 11008, 128, jnp.bfloat16),
        (2048, 960, 576, 128, jnp.bfloat16),
        (256, 4096, 11008, 11008, jnp.float32),
        (128, 12288, 4096, 128, jnp.bfloat16),
        (100, 960, 576, 576, jnp.bfloat16),
        (64, 12288, 4096, 128, jnp.float32),
        (64, 4096, 4096, 128, jnp.bfloat16),
    ],
)
def test_spills_nothing_and_copies_no_weights(t, n, m, size, out_dtype, compile_for_h100):
    function = functools.partial(gpu.matmul, out_dtype=out_dtype)
    compiled, reports = compile_for_h100(function, *operand_shapes(t, n, m, size, jnp.int8))
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
    # Sums of tokens, tokens padded to whole tiles, and the output past the last token.
    ragged = t * (m + 512) if m % 128 else 0
    ragged += 2 * t * (n + 128) + t * m if t % 8 else 0
    assert compiled.memory_analysis().temp_size_in_bytes <= t * -(-m // 512) * 32 + 2 * ragged
