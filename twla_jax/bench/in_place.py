"""Times the ops that change in place what they are given: caches, and the words that thread blocks exchange."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from twla_jax.bench import shapes, timing
from twla_jax.inference import generation
from twla_jax.inference.execution import has_kernels
from twla_jax.models.config import DecoderConfig
from twla_jax.ops.attention.kv_cache import LayerKV, empty_layer, write
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import decode_attention
from twla_jax.ops.linear_pair import LinearOperands, linear_pair, new_pair_exchange
from twla_jax.ops.qkv_attention import new_qkv_exchange, qkv_attention
from twla_jax.ops.rotate_quantize import quantizer_settings

CONTEXT = 512  # positions that attention reads
_ROOM = generation.cache_size(CONTEXT + 1)
_ROUNDS = 3  # over all caches


def attention_seconds(config: DecoderConfig, batch: int, dtype, implementation) -> float:
    """Return the seconds of `decode_attention` at `CONTEXT` filled positions, rotary angles and write included."""
    heads = config.num_heads + 2 * config.num_kv_heads
    qkv = jax.random.normal(jax.random.key(0), (batch, heads, config.head_dim), jnp.bfloat16)
    make = functools.partial(cache_layer, config=config, batch=batch, room=_ROOM, dtype=dtype)
    op = functools.partial(decode_attention, implementation=implementation)
    return _seconds_in_place(
        lambda qkv, _, *where: op(qkv, *where), qkv, lambda key: (None, make(key)), config
    )


def qkv_attention_seconds(config: DecoderConfig, dtype) -> float | None:
    """Return the seconds of `qkv_attention`, likewise; None where it is not one kernel."""
    n, m = shapes.matrices(config)["q,k,v"]
    rotation = shapes.rotation_for_kernels(jax.random.key(2), m, n)

    def make(key):
        weight, layer = shapes.weight(key, n, m), cache_layer(key, config, 1, _ROOM, dtype)
        return weight, (layer, new_qkv_exchange(layer, rotation, weight))

    if not has_kernels() or jax.eval_shape(make, jax.random.key(0))[1][1] is None:
        return None

    def op(x, weight, written, *where):
        layer, exchange = written
        settings = quantizer_settings(8, 0.9)
        mixed, *written = qkv_attention(
            x, rotation, settings, weight, layer, *where, exchange=exchange, apart=True
        )
        return mixed, tuple(written)

    return _seconds_in_place(op, shapes.activations(jax.random.key(0), 1, m), make, config)


def linear_pair_seconds(config: DecoderConfig) -> float | None:
    """Return the seconds of `linear_pair` for one token, gate included; None where it is not one kernel."""
    (n, m), (more, _) = (shapes.matrices(config)[name] for name in ("o", "gate,up"))
    rotations = [shapes.rotation_for_kernels(jax.random.key(2), *sizes) for sizes in ((m, n), (n, more))]

    def pair(weights):
        settings, scale = quantizer_settings(8, 0.9), jnp.ones(n, jnp.bfloat16)
        first, second = (
            LinearOperands(rotation=rotation, settings=settings, weight=weight)
            for rotation, weight in zip(rotations, weights, strict=True)
        )
        return first, dataclasses.replace(second, norm_scale=scale)

    def make(key):
        second = dataclasses.replace(shapes.weight(key, more, n), splits=(more // 2, more // 2))
        weights = shapes.weight(key, n, m), second
        return weights, new_pair_exchange(1, *pair(weights))

    if not has_kernels() or jax.eval_shape(make, jax.random.key(0))[1] is None:
        return None

    residual = shapes.activations(jax.random.key(1), 1, n)

    def op(x, weights, exchange, *_):
        *outputs, exchange = linear_pair(x, *pair(weights), residual, exchange)
        return outputs, exchange

    return _seconds_in_place(op, shapes.activations(jax.random.key(0), 1, m), make, config)


def _seconds_in_place(op, x, make, config: DecoderConfig) -> float:
    """Return the seconds of `op(x, weight, layer, positions, window)`, in a loop that updates layers in place.

    `make` returns a weight and a layer, or whatever else is updated, from a key.
    """
    angle = jax.random.normal(jax.random.key(1), (1, config.head_dim // 2))
    positions = Positions(
        query=jnp.full(1, CONTEXT), key=jnp.arange(_ROOM), cos=jnp.cos(angle), sin=jnp.sin(angle)
    )
    copies = int(timing.ROTATED_BYTES / shapes.bytes_of(make)) + 1 if has_kernels() else 1
    weights, layers = zip(*map(jax.jit(make), jax.random.split(jax.random.key(2), copies)), strict=True)
    one = jax.jit(lambda weight, layer, *more: op(*more[:1], weight, layer, *more[1:], jnp.int32(2**30)))

    def run(weights, layers, x, positions):
        def step(_, carry):
            pairs = zip(weights, carry[1], strict=True)
            mixed, layers = zip(*(one(*pair, x, positions) for pair in pairs), strict=True)
            return mixed, layers

        mixed = jax.eval_shape(one, weights[0], layers[0], x, positions)[0]
        mixed = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (mixed,) * copies)
        return jax.lax.fori_loop(0, _ROUNDS, step, (mixed, layers))

    return timing.seconds(run, weights, layers, x, positions) / (copies * _ROUNDS)


def cache_layer(key: jax.Array, config: DecoderConfig, batch: int, room: int, dtype) -> LayerKV:
    """Return a layer of random keys and values."""
    shape = (2, batch, config.num_kv_heads, room, config.head_dim)
    keys, values = jax.random.normal(key, shape, jnp.bfloat16).swapaxes(2, 3)
    return write(empty_layer(shape, dtype), keys, values, jnp.int32(0))
