"""Attention of one new token: against float64, and compiled for an H100."""

import dataclasses
import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.ops.attention import kv_cache
from twla_jax.ops.attention.kv_cache import LayerKV, empty_layer
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import (
    AttentionSplits,
    decode_attention,
    gpu,
    gpu_grouped,
    reference,
    split_sizes,
)
from twla_jax.ops.hopper.limits import BLOCK_MEMORY

from helpers import emulated_machine, emulated_threads
from helpers.token_operands import random_key

ALL = np.iinfo(np.int32).max
EPSILON = 1e-5
# Sequences, heads, key heads, features of a head, room, filled positions, window.
CASES = [
    (1, 2, 2, 64, 128, 100, ALL),
    (2, 4, 2, 64, 256, 200, 70),
    (1, 8, 2, 128, 320, 256, ALL),
    (1, 3, 1, 64, 72, 71, ALL),
    (1, 4, 1, 64, 128, 0, ALL),
    (1, 3, 1, 64, 192, 191, 1),
]


# One program each; their operations would each be compiled for every shape.
attend_by_reference = jax.jit(reference.decode_attention, static_argnames="epsilon")
written = jax.jit(kv_cache.write)


@functools.partial(jax.jit, static_argnums=tuple(range(7)), static_argnames="dtype")
def operands(b, heads, kv_heads, d, size, length, window, dtype=jnp.bfloat16):
    keys = jax.random.split(random_key(), 4)
    qkv = jax.random.normal(keys[0], (b, heads + 2 * kv_heads, d), dtype)
    entries = jax.random.normal(keys[1], (2, b, kv_heads, size, d), dtype)
    angle = jax.random.normal(keys[2], (1, d // 2))
    positions = Positions(
        query=jnp.full(1, length, jnp.int32), key=jnp.arange(size), cos=jnp.cos(angle), sin=jnp.sin(angle)
    )
    scales = tuple(1 + 0.1 * jax.random.normal(keys[3], (2, d)).astype(dtype))
    return qkv, LayerKV(entries=entries), positions, jnp.int32(window), scales


def expected(qkv, layer, positions, window, scales, *, norm, after=None):
    """Return the mix and the cache in float64, queries and keys rounded where the op rounds them.

    `after` are the cache's numbers with the new token's, where these are other than floats.
    """

    def rounded(x):
        return np.asarray(np.asarray(x, np.float32).astype(qkv.dtype), np.float64)

    def normed(x, scale):
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPSILON)
        return rounded(x * np.asarray(scale, np.float64))

    def rotated(x):
        cos, sin = (np.asarray(each, np.float64) for each in (positions.cos, positions.sin))
        first, second = np.split(x, 2, axis=-1)
        return rounded(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))

    cache = np.asarray(layer.entries, np.float64).copy()
    kv_heads, length = cache.shape[2], int(positions.query[0])
    q, k, v = np.split(np.asarray(qkv, np.float64), [-2 * kv_heads, -kv_heads], axis=1)
    if norm:
        q, k = normed(q, scales[0]), normed(k, scales[1])
    q, cache[0, :, :, length], cache[1, :, :, length] = rotated(q), rotated(k), v
    cache = cache if after is None else after
    seen = cache[:, :, :, max(0, length + 1 - int(window)) : length + 1]
    k, v = (np.repeat(each, q.shape[1] // kv_heads, axis=1) for each in seen)
    scores = np.einsum("bhd,bhsd->bhs", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhs,bhsd->bhd", weights / weights.sum(-1, keepdims=True), v)
    return mixed.reshape(len(mixed), -1), cache


def check(op, *, norm, case, dtype=jnp.bfloat16, tolerance=6e-3):
    arguments = operands(*case, dtype=dtype)
    mixed, cache = expected(*arguments, norm=norm)
    found, layer = op(*arguments[:4], arguments[4] if norm else None, epsilon=EPSILON)
    np.testing.assert_allclose(np.asarray(found, float), mixed, atol=tolerance * np.abs(mixed).max())
    # A key may lie on the edge between two bf16 numbers.
    edge = 2**-7 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(layer.entries, float), cache, rtol=edge, atol=1e-6)


def check_integers(op, *, norm, case, scales_of_values=None):
    qkv, floats, positions, window, scales = operands(*case)
    key, value = floats.entries.swapaxes(2, 3)
    layer = written(empty_layer(floats.entries.shape, jnp.int8), key, value, jnp.int32(0))
    if scales_of_values is not None:
        layer = dataclasses.replace(layer, scales=layer.scales.at[1].set(scales_of_values))
    arguments = (qkv, layer, positions, window, scales)
    _, after = attend_by_reference(*arguments[:4], scales if norm else None, epsilon=EPSILON)
    numbers = np.asarray(after.entries, float) * np.asarray(after.scales, float)[..., None]
    mixed, _ = expected(*arguments, norm=norm, after=numbers)
    found, cache = op(*arguments[:4], scales if norm else None, epsilon=EPSILON)
    np.testing.assert_allclose(np.asarray(found, float), mixed, atol=6e-3 * np.abs(mixed).max())
    codes, same = (np.asarray(each.entries, int) for each in (cache, after))
    # The new key may lie on the edge between two bf16 numbers, or between two codes.
    assert np.abs(codes - same).max() <= 1
    assert (codes != same).mean() < 1e-3
    np.testing.assert_allclose(cache.scales, after.scales, rtol=2**-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm", [False, True])
def test_reference(case, norm):
    check(attend_by_reference, norm=norm, case=case)
    check(attend_by_reference, norm=norm, case=case, dtype=jnp.float32, tolerance=1e-5)


def emulated(qkv, layer, positions, window, norm_scales, *, epsilon, config):
    """Run the kernel thread by thread, and return the mix and the cache."""
    heads, (_, b, kv_heads, _, d) = qkv.shape[1] - 2 * layer.entries.shape[2], layer.entries.shape
    quantized = layer.scales is not None
    grouped = isinstance(config, split_sizes.GroupConfig)
    kind: Any = gpu_grouped.GroupShape if grouped else gpu.HeadShape
    shape = kind(d=d, heads=heads, kv_heads=kv_heads, quantized=quantized, config=config)
    cache, lengths = jax.tree.map(np.array, layer), np.broadcast_to(positions.start, b)
    for each in jax.tree.leaves(cache):  # entries past the filled ones must not enter the mix
        for row, filled in enumerate(lengths):
            each[:, row, :, filled:] = -128 if each.dtype == np.int8 else np.nan
    splits, groups = ((), config.groups) if grouped else ((config.splits,) if config.apart else (), 1)
    out = np.zeros((b, *splits, heads, d), qkv.dtype)
    softmax = np.full((b, *splits, heads, 2), np.nan, np.float32)
    inputs = (
        qkv,
        jnp.stack([positions.cos.reshape(-1, d // 2), positions.sin.reshape(-1, d // 2)]),
        positions.query.reshape(-1),
        window.reshape(1),
        *(norm_scales or ()),
    )
    refs = [emulated_machine.Global(np.array(each)) for each in inputs]
    for block, split in itertools.product(
        range(b * heads // config.queries // groups), range(*splits or (1,))
    ):
        axes = {"head": block} | ({"split": split} if splits else {})
        size = (32 * config.warps * groups, 1 if splits or grouped else config.splits)
        machine = emulated_machine.start(*size, **axes)
        if grouped:
            sizes = gpu_grouped.memory(shape)
        else:
            sizes = {
                "partials_smem": ((config.warps, config.queries, d + 2), np.float32),
                "of_blocks_smem": ((config.splits, 3, config.queries * d // config.splits), np.float32),
            }
        memory = {name: machine.allocate(*size) for name, size in sizes.items()}
        of_cache = map(emulated_machine.Global, jax.tree.leaves(cache))
        outputs = map(emulated_machine.Global, (out, softmax) if splits else (out,))
        kernel = gpu_grouped._kernel if grouped else gpu._kernel
        kernel(*of_cache, *refs, *outputs, **memory, shape=shape, epsilon=epsilon)
    for each, before in zip(jax.tree.leaves(cache), jax.tree.leaves(layer), strict=True):
        for row, filled in enumerate(lengths):
            each[:, row, :, filled + 1 :] = before[:, row, :, filled + 1 :]
    if splits:
        parts = AttentionSplits(mixed=out.reshape(b, *splits, heads * d), softmax=softmax)
        return parts.merged(), cache
    return out.reshape(b, heads * d), cache


@pytest.mark.parametrize(
    ("case", "norm", "queries", "warps", "splits"),
    [
        (CASES[0], False, 1, 8, 1),
        (CASES[1], True, 2, 8, 2),
        (CASES[2], False, 4, 8, 1),
        (CASES[2], True, 1, 16, 1),
        (CASES[3], False, 3, 4, 4),
        (CASES[4], True, 1, 4, 1),
        (CASES[5], True, 1, 8, 2),
        ((1, 2, 1, 256, 300, 290, ALL), True, 2, 4, 1),
    ],
)
def test_gpu_kernel_thread_by_thread(case, norm, queries, warps, splits, monkeypatch):
    emulated_threads.emulate(monkeypatch)
    chosen = split_sizes.SplitConfig(queries=queries, warps=warps, splits=splits)
    check(functools.partial(emulated, config=chosen), norm=norm, case=case)


@pytest.mark.parametrize(
    ("case", "queries", "splits"),
    [(CASES[0], 1, 2), (CASES[1], 2, 4), (CASES[2], 1, 4), (CASES[4], 1, 4), (CASES[5], 1, 2)],
)
def test_gpu_kernel_that_leaves_parts_apart_thread_by_thread(case, queries, splits, monkeypatch):
    emulated_threads.emulate(monkeypatch)
    chosen = split_sizes.SplitConfig(queries=queries, warps=4, splits=splits, apart=True)
    check(functools.partial(emulated, config=chosen), norm=True, case=case)


@pytest.mark.parametrize(
    ("case", "norm", "queries", "warps", "splits"),
    [
        (CASES[0], True, 1, 4, 1),
        (CASES[1], False, 2, 4, 2),
        (CASES[2], True, 4, 8, 1),
        (CASES[4], False, 1, 4, 1),
        ((1, 2, 1, 256, 300, 290, ALL), False, 1, 4, 2),
    ],
)
def test_gpu_kernel_on_an_int8_cache_thread_by_thread(case, norm, queries, warps, splits, monkeypatch):
    emulated_threads.emulate(monkeypatch)
    chosen = split_sizes.SplitConfig(queries=queries, warps=warps, splits=splits, loads=4)
    check_integers(functools.partial(emulated, config=chosen), norm=norm, case=case)


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


@pytest.mark.parametrize("spread", [1, 300])
def test_scores_far_apart_and_scales_of_any_sign_and_size_on_tensor_cores(spread, monkeypatch):
    case = (2, 4, 2, 64, 128, 100, ALL)
    by_position = np.resize([1e-3, -1.0, 0.0, 1e-12, 3e4, -2e-9], 128)
    qkv, *rest = operands(*case)
    spread_out = (qkv * jnp.where(jnp.arange(8) < 4, spread, 1)[:, None]).astype(qkv.dtype)
    monkeypatch.setitem(globals(), "operands", lambda *_: (spread_out, *rest))
    emulated_threads.emulate(monkeypatch)
    chosen = split_sizes.GroupConfig(queries=2, warps=4)
    op = functools.partial(emulated, config=chosen)
    check_integers(op, norm=False, case=case, scales_of_values=jnp.asarray(by_position, jnp.float32))


@pytest.mark.parametrize("kernel", [False, True])
def test_every_sequence_may_be_at_a_position_of_its_own(kernel, monkeypatch):
    lengths, (qkv, layer, positions, window, scales) = (200, 0, 71), operands(3, 4, 2, 64, 256, 0, 90)
    angle = jax.random.normal(jax.random.key(9), (3, 1, 32))
    own = dataclasses.replace(
        positions, query=jnp.asarray(lengths)[:, None], cos=jnp.cos(angle), sin=jnp.sin(angle)
    )
    op = attend_by_reference
    if kernel:
        emulated_threads.emulate(monkeypatch)
        op = functools.partial(
            emulated, config=split_sizes.SplitConfig(queries=2, warps=4, splits=2, apart=True)
        )
    found, cache = op(qkv, layer, own, window, scales, epsilon=EPSILON)
    for row in range(3):
        alone = dataclasses.replace(own, query=own.query[row], cos=own.cos[row], sin=own.sin[row])
        one = LayerKV(entries=layer.entries[:, row : row + 1])
        mixed, entries = expected(qkv[row : row + 1], one, alone, window, scales, norm=True)
        np.testing.assert_allclose(np.asarray(found[row], float), mixed[0], atol=6e-3 * np.abs(mixed).max())
        written = np.asarray(cache.entries[:, row], float)
        np.testing.assert_allclose(written, entries[:, 0], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_sequences_beyond_the_first_keep_their_entries(dtype):
    qkv, floats, positions, window, _ = operands(2, 4, 2, 64, 128, 0, ALL, dtype=jnp.float32)
    empty = empty_layer((2, 5, 2, 128, 64), dtype)
    key, value = jnp.tile(floats.entries[:, :1], (1, 5, 1, 1, 1)).swapaxes(2, 3)
    layer = written(empty, key, value, jnp.int32(0))
    own = dataclasses.replace(
        positions,
        query=jnp.asarray([[3], [100]]),
        cos=jnp.tile(positions.cos, (2, 1, 1)),
        sin=jnp.tile(positions.sin, (2, 1, 1)),
    )
    mixed, after = attend_by_reference(qkv, layer, own, window)
    few, _ = attend_by_reference(qkv, layer.first_rows(2), own, window)
    np.testing.assert_array_equal(mixed, few)
    after, layer = jax.tree.map(np.asarray, (after, layer))
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[:, 2:], old[:, 2:]), after, layer)
    changed = (after.entries != layer.entries).any((0, 2, 4))
    assert [tuple(np.flatnonzero(row)) for row in changed] == [(3,), (100,), (), (), ()]


@pytest.mark.parametrize("shared", [1, 3, 4, 8])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_clusters_of_a_launch_are_all_there_at_once(shared, d):
    for kv_heads in (1, 3, 8, 32, 256):
        heads = kv_heads * shared
        for size in (64, 576, 1280, 8192):
            chosen = split_sizes.split_config(heads, shared, size, d)
            assert shared % chosen.queries == 0
            assert d % chosen.splits == 0
            if chosen.splits > 1:
                assert heads // chosen.queries <= {2: 66, 4: 30, 8: 15}[chosen.splits]


@pytest.mark.parametrize("shared", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("quantized", [False, True])
def test_groups_on_tensor_cores_share_blocks_that_fit(shared, d, quantized):
    for kv_heads, sequences in itertools.product((1, 3, 8), (8, 22, 64, 100)):
        heads = sequences * kv_heads * shared
        config = split_sizes.group_config(heads, shared, 640, d, quantized=quantized, grouped=True)
        if config is None:
            assert sequences * kv_heads * -(-shared // 8) < 64
            continue
        assert shared % config.queries == 0
        assert heads // config.queries % config.groups == 0
        assert config.warps * config.groups <= 16
        shape = gpu_grouped.GroupShape(
            d=d, heads=kv_heads * shared, kv_heads=kv_heads, quantized=quantized, config=config
        )
        assert sum(4 * math.prod(size) for size, _ in gpu_grouped.memory(shape).values()) <= BLOCK_MEMORY


@pytest.mark.parametrize(("d", "size", "dtype"), [(80, 64, jnp.bfloat16), (64, 64, jnp.float32)])
def test_the_reference_stands_in_for_what_the_kernel_cannot_take(d, size, dtype):
    qkv, _, positions, window, _ = operands(1, 2, 2, d, size, 9, ALL)
    layer = empty_layer((2, 1, 2, size, d), dtype)
    found = decode_attention(qkv, layer, positions, window, implementation="gpu")
    same = reference.decode_attention(qkv, layer, positions, window)
    jax.tree.map(np.testing.assert_array_equal, found, same)


WIDE, SHARED = (1, 32, 32, 128, 576, 512, ALL), (1, 32, 8, 128, 640, 512, ALL)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("case", "norm", "dtype", "apart"),
    [
        *itertools.product(
            [
                WIDE,
                (1, 32, 32, 128, 584, 512, ALL),
                (4, 32, 32, 128, 4096, 512, ALL),
                SHARED,
                (1, 64, 8, 128, 640, 512, ALL),
                (1, 9, 3, 64, 576, 512, ALL),
                (1, 9, 3, 64, 64, 9, ALL),
            ],
            [False],
            [jnp.bfloat16, jnp.int8],
            [False],
        ),
        *itertools.product([WIDE, SHARED], [True], [jnp.bfloat16, jnp.int8], [False, True]),
        ((1, 9, 3, 64, 576, 512, ALL), False, jnp.bfloat16, True),
    ],
)
def test_gpu_kernel_spills_nothing(case, norm, dtype, apart, compile_for_h100):
    shapes = list(jax.eval_shape(lambda: operands(*case)))
    if dtype == jnp.int8:
        shapes[1] = jax.eval_shape(lambda: empty_layer(shapes[1].entries.shape, dtype))
    op = functools.partial(gpu.decode_attention, epsilon=EPSILON, apart=apart)
    _, reports = compile_for_h100(op, *shapes[:4], shapes[4] if norm else None)
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ((64, 32, 8, 128, 640, 512, ALL), jnp.int8),
        ((64, 32, 8, 128, 640, 512, ALL), jnp.bfloat16),
        ((16, 64, 8, 128, 640, 512, ALL), jnp.int8),
        ((64, 9, 3, 64, 576, 512, ALL), jnp.int8),
        ((64, 16, 8, 256, 640, 512, ALL), jnp.int8),
    ],
)
def test_gpu_kernel_on_tensor_cores_spills_nothing(case, dtype, compile_for_h100):
    b, heads, kv_heads, d, size = case[:5]
    shapes = list(jax.eval_shape(lambda: operands(*case)))
    if dtype == jnp.int8:
        shapes[1] = jax.eval_shape(lambda: empty_layer(shapes[1].entries.shape, dtype))
    chosen = split_sizes.group_config(
        b * heads, heads // kv_heads, size, d, quantized=dtype == jnp.int8, grouped=True
    )
    op = functools.partial(gpu.decode_attention, epsilon=EPSILON, config=chosen)
    _, reports = compile_for_h100(op, *shapes)
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]


@pytest.mark.hlo
@pytest.mark.aot
def test_it_is_one_kernel_between_two_linears(compile_for):
    def attend(qkv, layer, positions, window):
        # XLA copies what it may not write to, so the cache must be donated.
        layer = LayerKV(entries=layer.entries * 2)
        angle = positions.cos
        positions = dataclasses.replace(positions, cos=jnp.cos(angle), sin=jnp.sin(angle))
        return decode_attention(qkv.reshape(1, -1, 128), layer, positions, window)

    qkv, *rest = jax.eval_shape(lambda: operands(1, 32, 32, 128, 576, 512, ALL))[:4]
    qkv = jax.ShapeDtypeStruct((1, 1, qkv.size), qkv.dtype)
    program = compile_for("h100", attend, qkv, *rest).as_text()
    found = re.findall(r"^ .*? = .*? ([\w-]+)\(", program[program.index("ENTRY") :], re.MULTILINE)
    idle = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple")
    # The fusions make the cache, and stack the positions' cosines and sines.
    assert sorted(name for name in found if name not in idle) == ["custom-call", "fusion", "fusion"]
