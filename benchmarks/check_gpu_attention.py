"""Checks the attention kernels on the GPU at hand against their XLA references; `check_gpu.py` runs it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.ops.attention.fused import chunk_attention
from twla_jax.ops.attention.kv_cache import LayerKV, empty_layer, write
from twla_jax.ops.attention.reference import Positions, attention
from twla_jax.ops.decode_attention import AttentionSplits, decode_attention
from twla_jax.ops.qkv_attention import new_qkv_exchange, qkv_attention

from gpu_operands import largest, random_input, random_weight

_EVERYWHERE = np.iinfo(np.int32).max

# Sequences, heads, key heads, features of a head, room, filled positions, window; every shape has other splits.
ATTENTION = (
    (2, 9, 3, 64, 576, 333, 64),
    (1, 9, 3, 64, 64, 63, _EVERYWHERE),
    (1, 32, 32, 128, 576, 512, _EVERYWHERE),
    (1, 32, 32, 128, 584, 583, _EVERYWHERE),
    (1, 32, 32, 128, 576, 0, _EVERYWHERE),
    (1, 32, 32, 128, 4096, 3000, 1000),
    (8, 32, 32, 128, 576, 100, _EVERYWHERE),
    (1, 32, 8, 128, 1024, 1000, _EVERYWHERE),
    (1, 64, 8, 128, 8192, 8000, _EVERYWHERE),
    (1, 9, 3, 64, 8192, 5000, 3000),
)


def check_attention(implementation: str, cases=ATTENTION) -> None:
    """A decode step's attention to 1e-2 of the largest value, which bf16 weights of the values cost; bf16 and int8."""
    for b, heads, kv_heads, d, size, length, window in cases:
        keys = jax.random.split(jax.random.key(6), 3)
        angle = jax.random.normal(keys[0], (1, d // 2))
        qkv = jax.random.normal(keys[1], (b, heads + 2 * kv_heads, d), jnp.bfloat16)
        shared = Positions(
            query=jnp.full(1, length, jnp.int32),
            key=jnp.arange(size),
            cos=jnp.cos(angle),
            sin=jnp.sin(angle),
        )
        # Sequences at positions of their own, as a server has them.
        angles = jnp.arange(1, b + 1)[:, None, None] * angle
        own = Positions(
            query=jnp.maximum(length - 7 * jnp.arange(b, dtype=jnp.int32), 0)[:, None],
            key=shared.key,
            cos=jnp.cos(angles),
            sin=jnp.sin(angles),
        )
        entries = jax.random.normal(keys[2], (2, b, kv_heads, size, d), jnp.bfloat16)
        integers = empty_layer(entries.shape, jnp.int8)
        layers = LayerKV(entries=entries), write(integers, *entries.swapaxes(2, 3), jnp.int32(0))
        norm_scales = (jnp.linspace(0.5, 1.5, d), jnp.linspace(1.5, 0.5, d))
        kinds = (shared, own) if b > 1 else (shared,)
        for layer, scales, positions in itertools.product(layers, (None, norm_scales), kinds):
            (found, cache), (expected, written) = (
                jax.jit(
                    functools.partial(decode_attention, norm_scales=scales, epsilon=1e-5, implementation=name)
                )(qkv, layer, positions, jnp.int32(window))
                for name in (implementation, "xla")
            )
            apart, _ = jax.jit(
                functools.partial(
                    decode_attention,
                    norm_scales=scales,
                    epsilon=1e-5,
                    apart=True,
                    implementation=implementation,
                )
            )(qkv, layer, positions, jnp.int32(window))
            merged = apart.merged() if isinstance(apart, AttentionSplits) else apart
            found, expected, merged = (values.astype(jnp.float32) for values in (found, expected, merged))
            for each in (found, merged):
                np.testing.assert_allclose(each, expected, rtol=0, atol=1e-2 * largest(expected))
            for new, same in zip(*map(jax.tree.leaves, (cache, written)), strict=True):
                new, same = (np.asarray(each, np.float32) for each in (new, same))
                # A key may lie on the edge between two bf16 numbers, or between two codes.
                edge = 1 if layer.scales is not None and new.ndim == 5 else 1e-6
                np.testing.assert_allclose(new, same, rtol=2**-7, atol=edge)


# Factors of the rotation, heads, key heads, room, filled positions, window; heads of 128 features.
QKV_ATTENTION = (
    ((64, 64), 32, 32, 640, 530, _EVERYWHERE),
    ((64, 64), 32, 32, 192, 3, _EVERYWHERE),
    ((64, 64), 32, 8, 576, 570, 100),
    ((64, 64), 32, 8, 2304, 2200, 1500),
    ((64, 128), 64, 8, 576, 555, _EVERYWHERE),
)


def check_qkv_attention(
    implementation: str, cases=QKV_ATTENTION, *, d: int = 128, repetitions: int = 20
) -> None:
    """Tokens, one after the other, in one kernel as in two ops, and every time the same; bf16 and int8."""
    for factors, heads, kv_heads, size, length, window in cases:
        x, rotation, settings = random_input(5, *factors)
        weight = random_weight(jax.random.key(2), (heads + 2 * kv_heads) * d, x.shape[-1])
        norm_scales = (jnp.linspace(0.5, 1.5, d), jnp.linspace(1.5, 0.5, d))
        for dtype, scales in ((jnp.bfloat16, None), (jnp.int8, None), (jnp.bfloat16, norm_scales)):
            step = functools.partial(
                qkv_attention,
                rotation=rotation,
                settings=settings,
                weight=weight,
                window=jnp.int32(window),
                norm_scale=jnp.linspace(0.5, 1.5, x.shape[-1]),
                epsilon=1e-5,
                head_norm_scales=scales,
                head_epsilon=1e-5,
                apart=True,
                implementation=implementation,
            )
            tokens = jax.jit(functools.partial(_in_turn, step), donate_argnames=("layer", "exchange"))
            entries = jax.random.normal(jax.random.key(6), (2, 1, size, kv_heads, d), jnp.bfloat16)
            empty = empty_layer((2, 1, kv_heads, size, d), dtype)
            stores = jax.tree.map(np.asarray, write(empty, *entries, jnp.int32(0)))
            expected, written, _ = tokens(x, jax.tree.map(jnp.asarray, stores), None, length)
            expected, exchange, first = (
                expected.astype(jnp.float32),
                new_qkv_exchange(stores, rotation, weight),
                None,
            )
            assert exchange is not None
            for _ in range(repetitions):
                found, layer, exchange = tokens(x, jax.tree.map(jnp.asarray, stores), exchange, length)
                first = found if first is None else first
                np.testing.assert_array_equal(found, first)
                jax.tree.map(np.testing.assert_array_equal, layer, written)
                found = found.astype(jnp.float32)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * largest(expected))


def _in_turn(step, x: jax.Array, layer: LayerKV, exchange: jax.Array | None, length: int):
    """Returns the mixes of tokens, from a position on, the cache with all of them, and the exchange."""
    size, d = layer.entries.shape[-2:]

    def one(carry, of_token):
        (layer, exchange), (x, position) = carry, of_token
        angle = position * jnp.linspace(1, 0.01, d // 2)[None]
        positions = Positions(
            query=position[None], key=jnp.arange(size), cos=jnp.cos(angle), sin=jnp.sin(angle)
        )
        mixed, *written = step(x[None], layer=layer, positions=positions, exchange=exchange)
        return tuple(written), mixed.merged() if isinstance(mixed, AttentionSplits) else mixed

    written, mixed = jax.lax.scan(one, (layer, exchange), (x, length + jnp.arange(len(x))))
    return mixed, *written


# Sequences, heads, key heads, features of a head, room, tokens of a chunk, those before it.
CHUNKS = (
    (1, 32, 8, 128, 4096, 512, 0),
    (1, 32, 8, 128, 4096, 512, 3000),
    (2, 9, 3, 64, 576, 64, 512),
    (1, 32, 32, 128, 1024, 500, 1),
)


def check_chunk_attention(implementation: str, cases=CHUNKS) -> None:
    """A chunk of a prompt through cuDNN as through XLA, to 1e-2 of the largest value; bf16 and int8."""
    kernel = functools.partial(
        chunk_attention, implementation="cudnn" if implementation == "gpu" else implementation
    )
    for b, heads, kv_heads, d, size, tokens, start in cases:
        keys = jax.random.split(jax.random.key(6), 2)
        angles = jnp.zeros((tokens, d // 2))
        at = start + jnp.arange(tokens, dtype=jnp.int32)
        positions = Positions(query=at, key=jnp.arange(size, dtype=jnp.int32), cos=angles, sin=angles)
        q = jax.random.normal(keys[0], (b, tokens, heads, d), jnp.bfloat16)
        entries = jax.random.normal(keys[1], (2, b, kv_heads, size, d), jnp.bfloat16)
        integers = write(empty_layer(entries.shape, jnp.int8), *entries.swapaxes(2, 3), jnp.int32(0))
        for layer in (LayerKV(entries=entries), integers):
            expected = jax.jit(attention)(q, layer, positions, jnp.int32(_EVERYWHERE)).astype(jnp.float32)
            found = jax.jit(kernel)(q, layer, positions).astype(jnp.float32)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * largest(expected))
