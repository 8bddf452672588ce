"""Checks attention of one new token against float64, and runs its GPU kernels thread by thread."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.ops.attention import kv_cache
from twla_jax.ops.attention.kv_cache import LayerKV, empty_layer
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import AttentionSplits, gpu, gpu_grouped, gpu_merge, reference, split_sizes

from helpers import emulated_machine
from helpers.token_operands import random_key

ALL = np.iinfo(np.int32).max
EPSILON = 1e-5

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


def check_integers(op, *, norm, case, spread=None, scales_of_values=None):
    """Check an op on an int8 cache; q, k and v may be `spread`, and values have other scales than their own."""
    qkv, floats, positions, window, scales = operands(*case)
    qkv = qkv if spread is None else (qkv * spread[:, None]).astype(qkv.dtype)
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
    groups = config.groups if grouped else 1
    splits = (config.splits,) if (config.splits > 1 if grouped else config.apart) else ()
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
        out = out.reshape(b, *splits, heads * d)
        if grouped:
            return _merged(out, softmax), cache
        return AttentionSplits(mixed=out, softmax=softmax).merged(), cache
    return out.reshape(b, heads * d), cache


def _merged(mixed, softmax):
    """Return what the kernel that merges splits makes of them, thread by thread."""
    merged = np.zeros_like(mixed[:, 0])
    refs = [emulated_machine.Global(each) for each in (mixed, softmax, merged)]
    for block in range(-(-merged.size // (2 * gpu_merge.THREADS))):
        emulated_machine.start(gpu_merge.THREADS, words=block)
        gpu_merge._kernel(*refs, shape=softmax.shape[:3], width=merged.shape[1])
    return merged
