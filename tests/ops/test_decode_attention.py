"""Attention of one new token: against float64, and compiled for an H100."""

import functools
import re

import emulated_threads
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.models.attention import Positions
from twla_jax.models.kv_cache import LayerKV, empty_layer
from twla_jax.ops.decode_attention import decode_attention, gpu, reference, tiles

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


def operands(b, heads, kv_heads, d, size, length, window, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 4)
    qkv = jax.random.normal(keys[0], (b, heads + 2 * kv_heads, d), dtype)
    entries = jax.random.normal(keys[1], (2, b, kv_heads, size, d), dtype)
    angle = jax.random.normal(keys[2], (1, d // 2))
    positions = Positions(
        query=jnp.full(1, length, jnp.int32), key=jnp.arange(size), cos=jnp.cos(angle), sin=jnp.sin(angle)
    )
    scales = tuple(1 + 0.1 * jax.random.normal(keys[3], (2, d)).astype(dtype))
    return qkv, LayerKV(entries=entries), positions, jnp.int32(window), scales


def expected(qkv, layer, positions, window, scales, *, norm):
    """The mix and the cache in float64, queries and keys rounded where the op rounds them."""

    def rounded(x):
        return np.asarray(jnp.asarray(x).astype(qkv.dtype), np.float64)

    def normed(x, scale):
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPSILON)
        return rounded(x * np.asarray(scale, np.float64))

    def turned(x):
        cos, sin = (np.asarray(each, np.float64) for each in (positions.cos, positions.sin))
        first, second = np.split(x, 2, axis=-1)
        return rounded(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))

    cache = np.asarray(layer.entries, np.float64).copy()
    kv_heads, length = cache.shape[2], int(positions.query[0])
    q, k, v = np.split(np.asarray(qkv, np.float64), [-2 * kv_heads, -kv_heads], axis=1)
    if norm:
        q, k = normed(q, scales[0]), normed(k, scales[1])
    q, cache[0, :, :, length], cache[1, :, :, length] = turned(q), turned(k), v
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norm", [False, True])
def test_reference(case, norm):
    check(reference.decode_attention, norm=norm, case=case)
    check(reference.decode_attention, norm=norm, case=case, dtype=jnp.float32, tolerance=1e-5)


def emulated(qkv, layer, positions, window, norm_scales, *, epsilon, tiles):
    """The kernel, thread by thread."""
    heads, (_, b, kv_heads, _, d) = qkv.shape[1] - 2 * layer.entries.shape[2], layer.entries.shape
    shape = gpu._Shape(d=d, heads=heads, kv_heads=kv_heads, tiles=tiles)
    entries, out = np.array(layer.entries), np.zeros((b, heads, d), qkv.dtype)
    inputs = (
        qkv,
        positions.cos[0],
        positions.sin[0],
        positions.query[:1],
        window.reshape(1),
        *(norm_scales or ()),
    )
    refs = [emulated_threads.Global(np.array(each)) for each in inputs]
    for block in range(b * heads // tiles.queries):
        machine = emulated_threads.start(32 * tiles.warps, tiles.splits, head=block)
        parts = machine.allocate((tiles.warps + 1, tiles.queries, d + 2), np.float32)
        entries_ref, out_ref = emulated_threads.Global(entries), emulated_threads.Global(out)
        gpu._kernel(entries_ref, *refs, out_ref, parts_smem=parts, shape=shape, epsilon=epsilon)
    return out.reshape(b, heads * d), LayerKV(entries=jnp.asarray(entries))


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
    emulated_threads.emulate(monkeypatch, gpu)
    chosen = tiles.Tiles(queries=queries, warps=warps, splits=splits)
    check(functools.partial(emulated, tiles=chosen), norm=norm, case=case)


@pytest.mark.parametrize(("d", "size", "dtype"), [(80, 64, jnp.bfloat16), (64, 64, jnp.int8)])
def test_the_reference_stands_in_for_what_the_kernel_cannot_take(d, size, dtype):
    qkv, _, positions, window, _ = operands(1, 2, 2, d, size, 9, ALL)
    layer = empty_layer((2, 1, 2, size, d), dtype)
    found = decode_attention(qkv, layer, positions, window, implementation="gpu")
    same = reference.decode_attention(qkv, layer, positions, window)
    jax.tree.map(np.testing.assert_array_equal, found, same)


@pytest.mark.aot
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        (1, 32, 32, 128, 576, 512, ALL),
        (1, 32, 32, 128, 584, 512, ALL),
        (4, 32, 32, 128, 4096, 512, ALL),
        (1, 32, 8, 128, 640, 512, ALL),
        (1, 64, 8, 128, 640, 512, ALL),
        (1, 9, 3, 64, 576, 512, ALL),
        (1, 9, 3, 64, 64, 9, ALL),
    ],
)
def test_gpu_kernel_spills_nothing(case, norm, compile_for_h100):
    shapes = jax.eval_shape(lambda: operands(*case))
    op = functools.partial(gpu.decode_attention, epsilon=EPSILON)
    _, reports = compile_for_h100(op, *shapes[:4], shapes[4] if norm else None)
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]


@pytest.mark.aot
def test_it_is_one_kernel_between_two_linears(compile_for):
    def attend(qkv, layer, positions, window):
        # XLA copies what it may not write to, so the cache must be its own.
        layer = LayerKV(entries=layer.entries * 2)
        return decode_attention(qkv.reshape(1, -1, 128), layer, positions, window)

    qkv, *rest = jax.eval_shape(lambda: operands(1, 32, 32, 128, 576, 512, ALL))[:4]
    qkv = jax.ShapeDtypeStruct((1, 1, qkv.size), qkv.dtype)
    program = compile_for("h100", attend, qkv, *rest).as_text()
    found = re.findall(r"^ .*? = .*? ([\w-]+)\(", program[program.index("ENTRY") :], re.MULTILINE)
    idle = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple")
    assert sorted(name for name in found if name not in idle) == ["custom-call", "fusion"]
