"""Checks the kernels on the GPU at hand, each against its XLA reference: `python benchmarks/check_gpu.py`.

For times there is `twla bench`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax import xla_flags
from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.integer_matmul import integer_matmul, integer_weight
from twla_jax.ops.linear_pair import LinearOperands, linear_pair, new_pair_exchange
from twla_jax.ops.quantized_linear import quantized_linear
from twla_jax.ops.rotate_quantize import rotate_quantize
from twla_jax.ops.ternary_matmul import ternary_matmul
from twla_jax.ops.tokens import group_sums

from check_gpu_attention import check_attention, check_chunk_attention, check_qkv_attention
from gpu_operands import (
    TOKENS,
    largest,
    random_input,
    random_integers,
    random_splits,
    random_tokens,
    random_weight,
)

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
            np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-4 * largest(expected))
        values = jax.random.normal(key, (t, m), jnp.bfloat16)
        found, expected = (product(values, weight, implementation=name) for name in (implementation, "xla"))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * largest(expected))


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
INTEGERS = (
    (1, 1000, 576, 128),
    (TOKENS, 4096, 4096, 128),
    (40, 1000, 1024, 1024),
    (70, 1000, 576, 128),
)


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
                    found, expected, rtol=0, atol=0 if exact else 1e-4 * largest(expected)
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
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * largest(expected))
        assert float(jnp.abs(found - expected).mean()) < 1e-3 * largest(expected)


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


CHECKS = (
    check,
    check_rotations,
    check_linears,
    check_linear_pairs,
    check_integers,
    check_attention,
    check_qkv_attention,
    check_chunk_attention,
)

if __name__ == "__main__":
    xla_flags.disable_triton_gemm()  # before the reference uses the GPU
    for each in CHECKS:
        each("gpu")
        print(f"{each.__name__}: equal to the reference", flush=True)
