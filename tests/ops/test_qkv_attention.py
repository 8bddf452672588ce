"""Queries, keys, values and attention in one op: equal to its two ops, and one kernel where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from twla_jax.bench import shapes
from twla_jax.ops.attention.kv_cache import empty_layer, write
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import (
    AttentionSplits,
    decode_attention,
    split_sizes,
)
from twla_jax.ops.decode_attention.gpu_heads import HeadShape
from twla_jax.ops.qkv_attention import gpu, new_qkv_exchange, qkv_attention
from twla_jax.ops.quantized_linear import gpu_linear, quantized_linear
from twla_jax.ops.rotate_quantize import gpu_rotation, quantizer_settings
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig

from helpers import emulated_machine, emulated_threads
from helpers.emulated_machine import Global
from helpers.token_operands import permutation, random_key, rotated

ALL = np.iinfo(np.int32).max
SETTINGS = quantizer_settings(4, 0.9)
EPSILON = 1e-5


# One program; its operations would each be compiled for every shape.
@functools.partial(jax.jit, static_argnums=tuple(range(8)))
def operands(b, m, heads, kv_heads, d, size, length, dtype=jnp.bfloat16):
    keys = jax.random.split(random_key(), 6)
    n = (heads + 2 * kv_heads) * d
    x = jax.random.normal(keys[0], (b, m), jnp.bfloat16)
    scale = (1 + 0.1 * jax.random.normal(keys[1], (m,))).astype(jnp.bfloat16)
    angle = jax.random.normal(keys[2], (1, d // 2))
    positions = Positions(
        query=jnp.full(1, length, jnp.int32), key=jnp.arange(size), cos=jnp.cos(angle), sin=jnp.sin(angle)
    )
    entries = jax.random.normal(keys[3], (2, b, size, kv_heads, d), jnp.bfloat16)
    layer = write(empty_layer((2, b, kv_heads, size, d), dtype), *entries, jnp.int32(0))
    rotation, weight = shapes.rotation_for_kernels(keys[4], m, n), shapes.weight(keys[5], n, m)
    head_scales = tuple(1 + 0.1 * jax.random.normal(keys[1], (2, d)).astype(jnp.bfloat16))
    return x, rotation, weight, scale, layer, positions, head_scales


def test_it_is_its_two_ops():
    x, rotation, weight, scale, layer, positions, head_scales = operands(2, 1024, 4, 2, 64, 64, 9)
    exchange = jnp.arange(512)[None]
    found, written, after = qkv_attention(
        x,
        rotation,
        SETTINGS,
        weight,
        layer,
        positions,
        jnp.int32(5),
        exchange,
        norm_scale=scale,
        epsilon=EPSILON,
        head_norm_scales=head_scales,
        head_epsilon=EPSILON,
    )
    y = quantized_linear(x, rotation, SETTINGS, weight, norm_scale=scale, epsilon=EPSILON)
    expected, cache = decode_attention(
        y.reshape(2, -1, 64), layer, positions, jnp.int32(5), norm_scales=head_scales, epsilon=EPSILON
    )
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, written, cache)
    np.testing.assert_array_equal(after, exchange)


def emulated(x, rotation, weight, scale, layer, positions, head_scales, *, window, before, splits, loads):
    """Run the kernel thread by thread, all blocks at once, on an exchange with the tag `before`."""
    (_, _, kv_heads, _, d), n = layer.entries.shape, weight.out_features
    heads, quantized = n // d - 2 * kv_heads, layer.scales is not None
    of_heads = split_sizes.SplitConfig(queries=1, warps=8, splits=splits, loads=loads, apart=True)
    shape = HeadShape(d=d, heads=heads, kv_heads=kv_heads, quantized=quantized, config=of_heads)
    rows, config = Rows(32, 1), RingTileConfig(rows=32, warpgroups=2, stages=1)
    of_token, cache = gpu_rotation.token_shape(x, rotation, 2), jax.tree.map(np.array, layer)
    filled = int(positions.query[0])
    for each in jax.tree.leaves(cache):  # entries past the filled ones must not enter the mix
        each[:, :, :, filled:] = -128 if each.dtype == np.int8 else np.nan
    exchange = np.full((1, n), before << 16 | 0x1234, np.uint32).view(np.int32)
    outputs = (
        np.full((1, splits, heads, d), np.nan, x.dtype),
        np.full((1, splits, heads, 2), np.nan, np.float32),
    )
    turns = jnp.stack([positions.cos[0], positions.sin[0]])
    of_linear = gpu_linear.global_operands((x,), rotation, SETTINGS, weight, (scale,))
    inputs = (turns, positions.query, np.full(1, window, np.int32), *head_scales, *of_linear)
    emulated_machine.start(256, n // 32, rows=None)
    emulated_machine.machine.axes["rows"] = emulated_machine.machine.blocks
    gpu._kernel(
        *map(Global, (exchange, *jax.tree.leaves(cache), *map(np.array, inputs), *outputs)),
        **emulated_threads.scratch(
            gpu._scratch_types(rows, config, of_token, weight, shape, layer.entries.dtype)
        ),
        rows=rows,
        config=config,
        of_token=of_token,
        weight=weight,
        shape=shape,
        epsilon=EPSILON,
        head_epsilon=EPSILON,
    )
    np.testing.assert_array_equal(exchange.view(np.uint32) >> 16, (before + 1) % 2**16)
    for each, old in zip(jax.tree.leaves(cache), jax.tree.leaves(layer), strict=True):
        each[:, :, :, filled + 1 :] = old[:, :, :, filled + 1 :]
    mixed, softmax = outputs
    return AttentionSplits(mixed=mixed.reshape(1, splits, -1), softmax=softmax).merged(), cache


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "size", "length", "window", "splits", "loads", "dtype", "before"),
    [
        (2, 2, 64, 256, 200, ALL, 4, 2, jnp.bfloat16, 0),
        (4, 1, 64, 192, 100, 40, 2, 3, jnp.bfloat16, 2**16 - 1),
        (1, 1, 128, 320, 319, ALL, 4, 2, jnp.bfloat16, 7),  # two steps
        (3, 1, 64, 64, 0, ALL, 2, 1, jnp.bfloat16, 2**15 - 1),
        (2, 1, 128, 192, 170, ALL, 4, 2, jnp.int8, 1),
    ],
)
def test_gpu_kernel_thread_by_thread(
    heads, kv_heads, d, size, length, window, splits, loads, dtype, before, monkeypatch
):
    x, rotation, *rest = operands(1, 1024, heads, kv_heads, d, size, length, dtype)
    rotation = permutation(rotation)  # exact in every order of additions, so that codes are equal
    weight, scale, layer, positions, head_scales = rest
    norms = {
        "norm_scale": scale,
        "head_norm_scales": head_scales,
        "epsilon": EPSILON,
        "head_epsilon": EPSILON,
    }
    expected, written, _ = qkv_attention(
        x, rotation, SETTINGS, weight, layer, positions, jnp.int32(window), implementation="xla", **norms
    )
    emulated_threads.emulate(monkeypatch)
    emulated_threads.emulate_kernel(monkeypatch, pl)
    monkeypatch.setattr(gpu_rotation, "rotate", rotated)
    found, cache = emulated(
        x,
        rotation,
        *rest,
        window=window,
        before=before,
        splits=splits,
        loads=loads,
    )
    expected = np.asarray(expected, float)
    np.testing.assert_allclose(np.asarray(found, float), expected, atol=1e-2 * np.abs(expected).max())
    for new, same in zip(jax.tree.leaves(cache), jax.tree.leaves(written), strict=True):
        # A key may lie on the edge between two bf16 numbers, or between two codes.
        edge = 1 if new.dtype == np.int8 else 1e-6
        np.testing.assert_allclose(np.asarray(new, float), np.asarray(same, float), rtol=2**-7, atol=edge)


WIDE, SHARED = (4096, 32, 32, 128), (4096, 32, 8, 128)


def abstract(m, heads, kv_heads, d, size, dtype=jnp.bfloat16):
    return jax.eval_shape(lambda: operands(1, m, heads, kv_heads, d, size, 0, dtype))


@pytest.mark.parametrize("size", [64, 640, 5120])
@pytest.mark.parametrize("model", [WIDE, SHARED, (8192, 64, 8, 128), (576, 9, 3, 64), (1024, 16, 8, 128)])
def test_blocks_that_wait_for_each_other_are_all_there_at_once(model, size, monkeypatch):
    x, rotation, weight, _, layer, _, _ = abstract(*model, size)
    if gpu.obstacle(x, rotation, weight, layer) is None:
        rows, _, shape = gpu._launch_plan(x, rotation, weight, layer)
        blocks = -(-weight.out_features // rows.each)
        assert shape.heads * shape.config.splits <= blocks <= 132
        monkeypatch.setattr(gpu, "multiprocessors", lambda: blocks - 1)
        assert "blocks" in (gpu.obstacle(x, rotation, weight, layer) or "")
    else:
        assert new_qkv_exchange(layer, rotation, weight) is None


@pytest.mark.parametrize("model", [WIDE, SHARED, (8192, 64, 8, 128)])
def test_models_of_these_shapes_have_the_kernel(model):
    x, rotation, weight, _, layer, _, _ = abstract(*model, 640)
    assert gpu.obstacle(x, rotation, weight, layer) is None


@pytest.mark.aot
@pytest.mark.parametrize(
    ("model", "size", "norm", "dtype"),
    [
        (WIDE, 640, False, jnp.bfloat16),
        (WIDE, 640, False, jnp.int8),
        (SHARED, 640, True, jnp.bfloat16),
        (SHARED, 2304, True, jnp.int8),
        ((8192, 64, 8, 128), 640, False, jnp.bfloat16),
    ],
)
def test_gpu_kernel_spills_nothing(model, size, norm, dtype, compile_for_h100):
    x, rotation, weight, scale, layer, positions, head_scales = abstract(*model, size, dtype)
    exchange = jax.ShapeDtypeStruct((1, weight.out_features), jnp.int32)

    def op(exchange, *operands):
        return gpu.qkv_attention(*operands, exchange=exchange, epsilon=EPSILON, head_epsilon=EPSILON)

    settings, window = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    operands = (x, rotation, settings, weight, scale, layer, positions, window, head_scales if norm else None)
    _, reports = compile_for_h100(op, exchange, *operands)
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
