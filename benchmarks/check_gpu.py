"""Numerics and times of the kernels on the GPU at hand: `python benchmarks/check_gpu.py`.

Every kernel is held against its XLA reference first. Times are those of the device (CUPTI), summed over all kernels of
a call; weights are rotated, so that they come from memory and not from the L2 cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.kotms import KroneckerRotation
from twla_jax.ops.int4_matmul import int4_matmul, int4_weight
from twla_jax.ops.rotate_quantize import kernel_rotation, quantizer_settings, rotate_quantize
from twla_jax.ops.ternary_matmul import KernelWeight, ternary_matmul
from twla_jax.ops.tokens import QuantizedTokens, group_sums
from twla_jax.packing import TILE

TOKENS = 8
PREFILL_TOKENS = 2048
# Rows and columns of q, k and v, o, gate and up, and down of LLaMA-2-7B.
MATRICES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
ROTATED_BYTES = 250e6  # several times the L2 cache


def random_weight(key: jax.Array, n: int, m: int, *, exact: bool = False) -> KernelWeight:
    """A matrix with an (α, μ) for every 128 columns; `exact` makes both 1, and the product a sum of integers."""
    keys = jax.random.split(key, 3)
    tiles = -(-m // TILE)
    unsigned = jax.random.randint(keys[0], (n, tiles * TILE // 4, 4), 0, 3, jnp.uint8)
    scales = jax.random.normal(keys[1], (tiles, 8, n)).astype(jnp.float16)
    return KernelWeight(
        codes=(unsigned << jnp.array([0, 2, 4, 6], jnp.uint8)).sum(-1, dtype=jnp.uint8),
        scales=jnp.ones_like(scales) if exact else scales,
        row_sums=jax.random.normal(keys[2], (n,)),
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


def check(implementation: str) -> None:
    """Integer sums exact, everything else to 1e-4 of the largest value, at whole and at ragged shapes."""
    product = jax.jit(
        functools.partial(ternary_matmul, out_dtype=jnp.float32),
        static_argnames="implementation",
    )
    key = jax.random.key(0)
    # Decode with whole and with ragged blocks of tokens; prefill likewise.
    for t, n, m in ((1, 128, 11008), (TOKENS, 1024, 4096), (19, 128, 576), (256, 1024, 4096), (77, 128, 576)):
        for exact in (True, False):
            x, weight = random_tokens(key, t, m, exact=exact), random_weight(key, n, m, exact=exact)
            found, expected = (product(x, weight, implementation=name) for name in (implementation, "xla"))
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=0 if exact else 1e-4 * _largest(expected)
            )
        values = jax.random.normal(key, (t, m), jnp.bfloat16)
        found, expected = (product(values, weight, implementation=name) for name in (implementation, "xla"))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * _largest(expected))
    four_bits = int4_weight([jax.random.normal(key, (49152, 576))])
    for t in (1, TOKENS, 77):
        for x in (random_tokens(key, t, 576), jax.random.normal(key, (t, 576), jnp.bfloat16)):
            found, expected = (
                int4_matmul(x, four_bits, out_dtype=jnp.float32, implementation=name)
                for name in (implementation, "xla")
            )
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * _largest(expected))
    for left, right in ((64, 64), (86, 128)):
        arguments = random_input(TOKENS, left, right)
        found, expected = (
            rotate_quantize(*arguments, implementation=name) for name in (implementation, "xla")
        )
        assert np.abs(np.asarray(found.codes, int) - np.asarray(expected.codes, int)).max() <= 1
        np.testing.assert_array_equal(found.sums, group_sums(found.codes))


def random_input(t: int, left: int, right: int):
    """Operands of `rotate_quantize` at 8 bits."""
    keys = jax.random.split(jax.random.key(1), 3)
    factors = (
        jnp.linalg.qr(jax.random.normal(key, (size, size)))[0]
        for key, size in zip(keys, (left, right), strict=False)
    )
    rotation = kernel_rotation(KroneckerRotation(*factors), jnp.bfloat16)
    x = (jax.random.normal(keys[2], (t, left * right)) + 0.3).astype(jnp.bfloat16)
    return x, rotation, quantizer_settings(8, 0.9)


def microseconds(function, *arguments) -> float:
    """Median of the device time of five calls."""
    from jax.experimental.mosaic.gpu import profiler

    _, calls = profiler.measure(jax.jit(function), aggregate=False, iterations=5)(*arguments)
    return float(np.median([sum(time for _, time in call) for call in calls])) * 1e3


def measure() -> None:
    """Prints the times."""
    block = jnp.ones(1 << 28, jnp.float32)
    bandwidth = 2 * block.nbytes / microseconds(lambda x: 2 * x, block)
    print(f"copy {bandwidth / 1e3:.0f} GB/s")
    for n, m in MATRICES:
        weight = random_weight(jax.random.key(0), n, m)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
        copies = int(ROTATED_BYTES / size) + 1
        weights = [random_weight(jax.random.key(i), n, m) for i in range(copies)]
        x = random_tokens(jax.random.key(1), TOKENS, m)
        time = microseconds(lambda x, ws: [ternary_matmul(x, w) for w in ws], x, weights) / copies
        dense = [
            jax.random.normal(jax.random.key(i), (n, m), jnp.bfloat16)
            for i in range(int(ROTATED_BYTES / (2 * n * m)) + 1)
        ]
        values = jnp.ones((TOKENS, m), jnp.bfloat16)
        bf16 = microseconds(lambda x, ws: [x @ w.T for w in ws], values, dense) / len(dense)
        share = size / time / bandwidth
        print(
            f"{n}x{m}, {TOKENS} tokens: {time:.1f} us, {share:.0%} of copy, bf16 {bf16:.1f} us, {bf16 / time:.1f} x"
        )
    prefill()
    for t in (TOKENS, PREFILL_TOKENS):
        time, xla = (
            microseconds(functools.partial(rotate_quantize, implementation=name), *random_input(t, 64, 64))
            for name in ("gpu", "xla")
        )
        print(f"rotate_quantize 4096, {t} tokens: {time:.1f} us, xla {xla:.1f} us")


def prefill() -> None:
    """Prints the times of many tokens: the matmul alone, and with rotation and quantisation."""
    t, n, m = PREFILL_TOKENS, 4096, 4096
    weight, x = random_weight(jax.random.key(0), n, m), random_tokens(jax.random.key(1), t, m)
    alone = microseconds(ternary_matmul, x, weight)

    def whole(weight, *arguments):
        return ternary_matmul(rotate_quantize(*arguments), weight)

    together = microseconds(whole, weight, *random_input(t, 64, 64))
    eight = jnp.ones((n, m), jnp.int8)
    int8 = microseconds(
        lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32),
        x.codes,
        eight,
    )
    bf16 = microseconds(lambda x, w: x @ w.T, jnp.ones((t, m), jnp.bfloat16), eight.astype(jnp.bfloat16))
    print(
        f"{n}x{m}, {t} tokens: {alone:.1f} us, with rotation and codes {together:.1f} us, "
        f"int8 {int8:.1f} us, bf16 {bf16:.1f} us"
    )


def _largest(values: jax.Array) -> float:
    return float(jnp.abs(values).max())


if __name__ == "__main__":
    check("gpu")
    print("numerics: equal to the reference")
    measure()
