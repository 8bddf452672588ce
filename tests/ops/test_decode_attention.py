"""Attention of one new token: against float64, and compiled for an H100."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.ops.attention.kv_cache import LayerKV, empty_layer
from twla_jax.ops.decode_attention import (
    decode_attention,
    gpu,
    reference,
    split_sizes,
)

from helpers import emulated_threads
from helpers.decode_attention import (
    ALL,
    EPSILON,
    attend_by_reference,
    check,
    check_integers,
    emulated,
    expected,
    operands,
    written,
)

# Sequences, heads, key heads, features of a head, room, filled positions, window.
CASES = [
    (1, 2, 2, 64, 128, 100, ALL),
    (2, 4, 2, 64, 256, 200, 70),
    (1, 8, 2, 128, 320, 256, ALL),
    (1, 3, 1, 64, 72, 71, ALL),
    (1, 4, 1, 64, 128, 0, ALL),
    (1, 3, 1, 64, 192, 191, 1),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm", [False, True])
def test_reference(case, norm):
    check(attend_by_reference, norm=norm, case=case)
    check(attend_by_reference, norm=norm, case=case, dtype=jnp.float32, tolerance=1e-5)


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


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(("d", "size", "dtype"), [(80, 64, jnp.bfloat16), (64, 64, jnp.float32)])
def test_the_reference_stands_in_for_what_a_kernel_cannot_take(d, size, dtype, platform):
    qkv, _, positions, window, _ = operands(1, 2, 2, d, size, 9, ALL)
    layer = empty_layer((2, 1, 2, size, d), dtype)
    found = decode_attention(qkv, layer, positions, window, implementation=platform)
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
