"""Numerics of the kernels on the GPU at hand, each against its XLA reference: `python benchmarks/check_gpu.py`.

For times there is `twla bench`.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax import xla_flags
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.packing import TILE
from twla_jax.core.tensors import IntegerTensor
from twla_jax.ops.attention.kv_cache import LayerKV, empty_layer, write
from twla_jax.ops.attention.reference import Positions
from twla_jax.ops.decode_attention import AttentionSplits, decode_attention
from twla_jax.ops.integer_matmul import integer_matmul, integer_weight
from twla_jax.ops.linear_pair import LinearOperands, linear_pair, new_pair_exchange
from twla_jax.ops.qkv_attention import new_qkv_exchange, qkv_attention
from twla_jax.ops.quantized_linear import quantized_linear
from twla_jax.ops.rotate_quantize import kernel_rotation, quantizer_settings, rotate_quantize
from twla_jax.ops.ternary_matmul import KernelWeight, ternary_matmul
from twla_jax.ops.ternary_matmul.weight import pair
from twla_jax.ops.tokens import QuantizedTokens, group_sums

TOKENS = 8


def random_weight(
    key: jax.Array, n: int, m: int, *, exact: bool = False, grouped: bool = True
) -> KernelWeight:
    """A matrix with an (α, μ) for every 128 columns, up to 63 steps each, or for a row if not `grouped`.

    `exact` makes both 1, and the product a sum of integers.
    """
    keys = jax.random.split(key, 3)
    tiles = -(-m // TILE)
    unsigned = jax.random.randint(keys[0], (tiles, n, TILE // 4, 4), 0, 3, jnp.uint8)
    if grouped:
        alpha, mu = (
            jnp.ones((2, tiles, 4, n), int)
            if exact
            else jax.random.randint(keys[1], (2, tiles, 4, n), -63, 64)
        )
        scales = pair(alpha, mu - alpha)  # of stored codes, T + 1
    else:
        scales = jnp.ones((1, 2, n)) if exact else jax.random.randint(keys[1], (1, 2, n), -63, 64) / 64
        scales = scales.astype(jnp.float16)
    return KernelWeight(
        codes=(unsigned << jnp.array([0, 2, 4, 6], jnp.uint8)).sum(-1, dtype=jnp.uint8),
        scales=scales,
        row_sums=jax.random.normal(keys[2], (n,)),
        steps=jnp.full(n, 1 / 64 if grouped and not exact else 1.0),
        bias=jnp.zeros(n),
        in_features=m,
        splits=(n,),
    )


def random_tokens(key: jax.Array, t: int, m: int, *, exact: bool = False) -> QuantizedTokens:
    """8-bit codes; `exact` leaves scale and zero point out."""
    codes = jax.random.randint(key, (t, m), -128, 128, jnp.int8)
    scale = jnp.ones(t) if exact else jax.random.uniform(key, (t,))
    zero_point = jnp.zeros(t) if exact else jax.random.normal(key, (t,))
    return QuantizedTokens(codes=codes, scale=scale, zero_point=zero_point, sums=group_sums(codes))


# Tokens, rows, columns, whether there are groups. Few tokens first; of many, a short last tile and 8 tokens cut, then
# three blocks of rows, which clusters of two do not divide, and warpgroups that share columns or have rows of their
# own; at last, few tokens with more rows and tiles of their own: more than a block has at once, and a last block of
# rows that is cut.
PRODUCTS = (
    (1, 1024, 4096, True),
    (TOKENS, 1024, 4096, False),
    (16, 128, 2048, True),
    (100, 128, 576, True),
    (100, 128, 576, False),
    (300, 384, 4096, True),
    (40, 4096, 4096, True),
    (64, 12288, 1024, False),
    (200, 4096, 2048, True),
    (TOKENS, 8192, 1024, True),
    (13, 1024, 4096, False),
    (16, 22016, 4096, True),
    (24, 1024, 4096, True),
    (TOKENS, 57344, 1024, True),
    (TOKENS, 57344, 1024, False),
    (TOKENS, 10240, 8192, True),
    (TOKENS, 4096, 11008, True),
    (16, 4096, 11008, True),
    (TOKENS, 8192, 28672, True),
    (1, 22016, 4096, True),
    (3, 22016, 4096, True),
    (1, 8192, 28672, True),
)


def check(implementation: str, products=PRODUCTS) -> None:
    """Integer sums exact, everything else to 1e-4 of the largest value, at whole and at ragged shapes."""
    product = jax.jit(
        functools.partial(ternary_matmul, out_dtype=jnp.float32),
        static_argnames="implementation",
    )
    key = jax.random.key(0)
    for t, n, m, grouped in products:
        for exact in (True, False):
            x = random_tokens(key, t, m, exact=exact)
            weight = random_weight(key, n, m, exact=exact, grouped=grouped)
            found, expected = (product(x, weight, implementation=name) for name in (implementation, "xla"))
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=0 if exact else 1e-4 * _largest(expected)
            )
        values = jax.random.normal(key, (t, m), jnp.bfloat16)
        found, expected = (product(values, weight, implementation=name) for name in (implementation, "xla"))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * _largest(expected))


# Factors' rows, and what is before them: columns that are filled up, one, two and four warpgroups, and at 600 tokens
# several for a block.
ROTATIONS = (
    (64, 64, "norm"),
    (24, 24, "norm"),
    (86, 128, None),
    (86, 128, "gate"),
    (32, 48, "gate"),
    (112, 128, "gate"),
    (128, 224, "gate"),
)


def check_rotations(implementation: str, rotations=ROTATIONS) -> None:
    """Codes of 8 bits, of which some differ by one where sums are added up in another order, and their sums."""
    for left, right, kind in rotations:
        options = {"gated": kind == "gate", "epsilon": 1e-5}
        if kind == "norm":
            options["norm_scale"] = jnp.linspace(0.5, 1.5, left * right)
        for t in (TOKENS, 600):
            arguments = random_input(t, left, right, gated=options["gated"])
            found, expected = (
                rotate_quantize(*arguments, **options, implementation=name)
                for name in (implementation, "xla")
            )
            difference = np.abs(np.asarray(found.codes, int) - np.asarray(expected.codes, int))
            assert difference.max() <= 1
            assert difference.mean() < 0.01
            np.testing.assert_array_equal(found.sums, group_sums(found.codes))
            np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-2)
            np.testing.assert_allclose(found.zero_point, expected.zero_point, atol=1)


# Tokens, rows, columns, group size.
INTEGERS = ((1, 1000, 576, 128), (TOKENS, 4096, 4096, 128), (40, 1000, 1024, 1024))


def check_integers(implementation: str, products=INTEGERS) -> None:
    """Weights of 4 and 8 bits: sums of integers exact, everything else to 1e-4 of the largest value."""
    product = functools.partial(integer_matmul, out_dtype=jnp.float32)
    for t, n, m, size in products:
        for bits in (4, 8):
            for exact in (True, False):
                keys = jax.random.split(jax.random.key(6), 3)
                weight = integer_weight(random_integers(keys[0], n, m, bits, size, exact=exact))
                x = (
                    jax.random.randint(keys[1], (t, m), -8, 9)
                    if exact
                    else jax.random.normal(keys[2], (t, m))
                )
                x = x.astype(jnp.bfloat16)
                found, expected = (
                    product(x, weight, implementation=name) for name in (implementation, "xla")
                )
                np.testing.assert_allclose(
                    found, expected, rtol=0, atol=0 if exact else 1e-4 * _largest(expected)
                )


def random_integers(
    key: jax.Array, n: int, m: int, bits: int, size: int, *, exact: bool = False
) -> IntegerTensor:
    """Random codes, scales and zero points by groups of this size; `exact` makes the scales 1."""
    keys = jax.random.split(key, 3)
    groups = (n, -(-m // size))
    scale = jnp.ones(groups) if exact else jax.random.uniform(keys[0], groups, minval=0.5, maxval=1.5)
    return IntegerTensor(
        codes=jax.random.randint(keys[1], (n, m), 0, 2**bits, jnp.int32).astype(jnp.uint8),
        scale=scale.astype(jnp.float16),
        zero_point=jax.random.randint(keys[2], groups, 0, 2**bits, jnp.int32).astype(jnp.uint8),
        in_features=m,
        group_size=size,
        bits=bits,
    )


# Tokens, factors' rows, outputs, and what comes with the product.
LINEARS = (
    (1, 64, 64, 1024, "norm"),
    (1, 64, 64, 4096, "residual"),
    (1, 64, 64, 2 * 11008, "gate"),
    (1, 86, 128, 4096, "residual"),
    (2, 64, 64, 4096, "residual"),
    (2, 86, 128, 4096, "residual"),
    (3, 64, 64, 1024, "norm"),
    (4, 64, 64, 2 * 11008, "gate"),
    (1, 64, 64, 4096, "parts"),
    (1, 32, 48, 640, "residual"),
    (3, 24, 24, 2 * 1536, "gate"),
    (2, 24, 24, 576, "parts"),
)


def check_linears(implementation: str, linears=LINEARS) -> None:
    """Linears in one kernel; a few codes may differ by one level, which is a thousandth of the outputs' size."""
    for t, left, right, n, kind in linears:
        x, rotation, settings = random_input(t, left, right)
        weight = random_weight(jax.random.key(4), n, left * right)
        norm_scale = residual = None
        if kind == "parts":
            x = random_splits(t, left * right, left * right // 64)
        if kind == "norm":
            norm_scale = jnp.linspace(0.5, 1.5, left * right)
        if kind == "residual":
            residual = 10 * jax.random.normal(jax.random.key(5), (t, n), jnp.bfloat16)
        gated = kind == "gate"
        if gated:
            weight = dataclasses.replace(weight, splits=(n // 2, n // 2))
        linear = jax.jit(
            functools.partial(quantized_linear, epsilon=1e-5, gated=gated), static_argnames="implementation"
        )
        found, expected = (
            linear(
                x,
                rotation,
                settings,
                weight,
                norm_scale=norm_scale,
                residual=residual,
                implementation=name,
            ).astype(jnp.float32)
            for name in (implementation, "xla")
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * _largest(expected))
        assert float(jnp.abs(found - expected).mean()) < 1e-3 * _largest(expected)


def random_splits(t: int, m: int, heads: int) -> AttentionSplits:
    """Attention over four parts of the positions."""
    keys = jax.random.split(jax.random.key(7), 3)
    softmax = [jax.random.uniform(key, (t, 4, heads), minval=0.5, maxval=4) for key in keys[:2]]
    mixed = jax.random.normal(keys[2], (t, 4, m), jnp.bfloat16)
    return AttentionSplits(mixed=mixed, softmax=jnp.stack(softmax, -1))


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
        positions = Positions(
            query=jnp.full(1, length, jnp.int32),
            key=jnp.arange(size),
            cos=jnp.cos(angle),
            sin=jnp.sin(angle),
        )
        entries = jax.random.normal(keys[2], (2, b, kv_heads, size, d), jnp.bfloat16)
        integers = empty_layer(entries.shape, jnp.int8)
        layers = LayerKV(entries=entries), write(integers, *entries.swapaxes(2, 3), jnp.int32(0))
        norm_scales = (jnp.linspace(0.5, 1.5, d), jnp.linspace(1.5, 0.5, d))
        for layer, scales in itertools.product(layers, (None, norm_scales)):
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
                np.testing.assert_allclose(each, expected, rtol=0, atol=1e-2 * _largest(expected))
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


# Columns and the residual stream's width, each as sizes of its rotation's factors, and the MLP's width.
LINEAR_PAIRS = (((64, 64), (64, 64), 11008), ((64, 64), (64, 64), 12288), ((32, 64), (40, 64), 6912))


def check_linear_pairs(implementation: str, cases=LINEAR_PAIRS, *, repetitions: int = 20) -> None:
    """A token's in one kernel as in two ops, bit for bit, of attention whole and in parts; and every time the same."""
    for of_first, of_second, hidden in cases:
        (x, one, settings), (residual, two, _) = random_input(1, *of_first), random_input(1, *of_second)
        n = residual.shape[-1]
        weight = random_weight(jax.random.key(4), 2 * hidden, n)
        first = LinearOperands(
            rotation=one, settings=settings, weight=random_weight(jax.random.key(3), n, x.shape[-1])
        )
        second = LinearOperands(
            rotation=two,
            settings=settings,
            weight=dataclasses.replace(weight, splits=(hidden, hidden)),
            norm_scale=jnp.linspace(0.5, 1.5, n),
            epsilon=1e-5,
        )
        parts = AttentionSplits(
            mixed=jax.random.normal(jax.random.key(5), (1, 4, x.shape[-1]), jnp.bfloat16),
            softmax=jnp.abs(jax.random.normal(jax.random.key(6), (1, 4, x.shape[-1] // 128, 2))) + 0.1,
        )
        pair = jax.jit(functools.partial(linear_pair, implementation=implementation))
        for tokens in (x, parts):
            *expected, _ = pair(tokens, first, second, residual)
            exchange = new_pair_exchange(1, first, second)
            assert exchange is not None
            for _ in range(repetitions):
                *found, exchange = pair(tokens, first, second, residual, exchange)
                jax.tree.map(np.testing.assert_array_equal, found, expected)


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
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * _largest(expected))


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


def random_input(t: int, left: int, right: int, *, gated: bool = False):
    """Operands of `rotate_quantize` at 8 bits; twice as wide if gated."""
    keys = jax.random.split(jax.random.key(1), 3)
    factors = (
        jnp.linalg.qr(jax.random.normal(key, (size, size)))[0]
        for key, size in zip(keys, (left, right), strict=False)
    )
    rotation = kernel_rotation(KroneckerRotation(*factors), jnp.bfloat16)
    width = left * right * (2 if gated else 1)
    x = (jax.random.normal(keys[2], (t, width)) + 0.3).astype(jnp.bfloat16)
    return x, rotation, quantizer_settings(8, 0.9)


def _largest(values: jax.Array) -> float:
    return float(jnp.abs(values).max())


CHECKS = (
    check,
    check_rotations,
    check_linears,
    check_linear_pairs,
    check_integers,
    check_attention,
    check_qkv_attention,
)

if __name__ == "__main__":
    xla_flags.disable_triton_gemm()  # before the reference uses the GPU
    for each in CHECKS:
        each("gpu")
        print(f"{each.__name__}: equal to the reference", flush=True)
