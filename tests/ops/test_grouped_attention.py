"""Attention on tensor cores: thread by thread against float64, and compiled for an H100."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.ops.attention.kv_cache import empty_layer
from twla_jax.ops.decode_attention import gpu, gpu_grouped, split_sizes
from twla_jax.ops.hopper.limits import BLOCK_MEMORY

from helpers import emulated_threads
from helpers.decode_attention import ALL, EPSILON, check, check_integers, emulated, operands

GROUPS = [
    ((2, 4, 2, 64, 256, 200, 70), True, 2, 4, 4),
    ((1, 8, 2, 128, 320, 256, ALL), True, 4, 4, 2),
    ((1, 3, 1, 64, 72, 71, ALL), False, 3, 4, 1),
    ((1, 12, 1, 128, 64, 0, ALL), True, 6, 8, 1),
    ((1, 8, 1, 256, 144, 130, 1), False, 8, 4, 1),
]


@pytest.mark.parametrize(("case", "norm", "queries", "warps", "groups"), GROUPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_gpu_kernel_on_tensor_cores_thread_by_thread(case, norm, queries, warps, groups, dtype, monkeypatch):
    emulated_threads.emulate(monkeypatch)
    chosen = split_sizes.GroupConfig(queries=queries, warps=warps, groups=groups)
    op = functools.partial(emulated, config=chosen)
    (check if dtype == jnp.bfloat16 else check_integers)(op, norm=norm, case=case)


@pytest.mark.parametrize(
    ("case", "splits"), [((2, 4, 2, 64, 256, 200, 70), 3), ((1, 4, 1, 128, 192, 63, ALL), 2)]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_several_blocks_of_tensor_cores_share_the_positions_of_a_key_head(case, splits, dtype, monkeypatch):
    emulated_threads.emulate(monkeypatch)
    chosen = split_sizes.GroupConfig(queries=case[1] // case[2], warps=4, splits=splits)
    op = functools.partial(emulated, config=chosen)
    (check if dtype == jnp.bfloat16 else check_integers)(op, norm=True, case=case)


@pytest.mark.parametrize("spread", [1, 300])
def test_scores_far_apart_and_scales_of_any_sign_and_size_on_tensor_cores(spread, monkeypatch):
    case = (2, 4, 2, 64, 128, 100, ALL)
    by_position = np.resize([1e-3, -1.0, 0.0, 1e-12, 3e4, -2e-9], 128)
    of_queries = jnp.where(jnp.arange(8) < 4, spread, 1)
    emulated_threads.emulate(monkeypatch)
    chosen = split_sizes.GroupConfig(queries=2, warps=4)
    op = functools.partial(emulated, config=chosen)
    of_values = jnp.asarray(by_position, jnp.float32)
    check_integers(op, norm=False, case=case, spread=of_queries, scales_of_values=of_values)


@pytest.mark.parametrize("shared", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("quantized", [False, True])
def test_groups_on_tensor_cores_share_blocks_that_fit(shared, d, quantized):
    for kv_heads, sequences, size in itertools.product((1, 3, 8), (1, 8, 22, 64, 100), (640, 40000)):
        heads = sequences * kv_heads * shared
        config = split_sizes.group_config(heads, shared, size, d, quantized=quantized)
        if config is None:
            assert size == 640
            assert sequences * kv_heads * -(-shared // 8) < 128
            continue
        if config.splits > 1:
            assert config.groups == 1
            assert heads // config.queries * config.splits <= 132
        assert shared % config.queries == 0
        assert heads // config.queries % config.groups == 0
        assert config.warps * config.groups <= 16
        shape = gpu_grouped.GroupShape(
            d=d, heads=kv_heads * shared, kv_heads=kv_heads, quantized=quantized, config=config
        )
        assert sum(4 * math.prod(size) for size, _ in gpu_grouped.memory(shape).values()) <= BLOCK_MEMORY


@pytest.mark.aot
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ((64, 32, 8, 128, 640, 512, ALL), jnp.int8),
        ((64, 32, 8, 128, 640, 512, ALL), jnp.bfloat16),
        ((16, 64, 8, 128, 640, 512, ALL), jnp.int8),
        ((64, 9, 3, 64, 576, 512, ALL), jnp.int8),
        ((64, 16, 8, 256, 640, 512, ALL), jnp.int8),
        ((16, 32, 32, 128, 640, 512, ALL), jnp.int8),
        ((1, 32, 8, 128, 32832, 32768, ALL), jnp.int8),
        ((1, 4, 1, 256, 32832, 32768, ALL), jnp.bfloat16),
    ],
)
def test_gpu_kernel_on_tensor_cores_spills_nothing(case, dtype, compile_for_h100):
    b, heads, kv_heads, d, size = case[:5]
    shapes = list(jax.eval_shape(lambda: operands(*case)))
    if dtype == jnp.int8:
        shapes[1] = jax.eval_shape(lambda: empty_layer(shapes[1].entries.shape, dtype))
    chosen = split_sizes.group_config(b * heads, heads // kv_heads, size, d, quantized=dtype == jnp.int8)
    op = functools.partial(gpu.decode_attention, epsilon=EPSILON, config=chosen)
    _, reports = compile_for_h100(op, *shapes)
    assert len(reports) == (1 if chosen.splits == 1 else 2)
    assert set(reports) == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
