"""Four-bit weights: what rounding may change, the reference against float64, the kernels against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.ops.int4_matmul import int4_matmul, int4_rows, int4_weight
from twla_jax.ops.ternary_matmul import gpu, reference, tpu
from twla_jax.ops.tokens import QuantizedTokens, group_sums

# rows and columns: whole tiles, an odd number of groups, a short last group.
SHAPES = [(128, 512), (130, 640), (96, 172)]


def values(n, m, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, m)) + 0.2, jnp.float32)


def tokens(t, m):
    rng = np.random.default_rng(1)
    codes = jnp.asarray(rng.integers(-128, 128, (t, m)), jnp.int8)
    return QuantizedTokens(
        codes=codes,
        scale=jnp.asarray(rng.random(t), jnp.float32),
        zero_point=jnp.asarray(rng.integers(-99, 99, t), jnp.float32),
        sums=group_sums(codes),
    )


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_no_weight_moves_by_more_than_half_a_step(n, m):
    matrix = values(n, m)
    found = int4_rows(int4_weight([matrix]), jnp.arange(n), jnp.float32)
    for start in range(0, m, 128):
        group = np.asarray(matrix[:, start : start + 128])
        step = (group.max(1) - group.min(1)) / 15
        error = np.abs(found[:, start : start + 128] - group).max(1)
        assert (error <= 0.5 * step + 2e-3 * np.abs(group).max(1)).all()


def test_constant_rows_survive():
    matrix = jnp.array([[0.0], [0.5], [-2.0]]) * jnp.ones((3, 256))
    np.testing.assert_array_equal(int4_rows(int4_weight([matrix]), jnp.arange(3), jnp.float32), matrix)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_reference_is_the_product_with_the_rows(n, m, quantized):
    bias = jnp.asarray(np.random.default_rng(1).normal(size=n))
    weight = int4_weight([values(n, m)], [bias])
    dense = np.asarray(int4_rows(weight, jnp.arange(n), jnp.float32), np.float64)
    x = tokens(3, m) if quantized else values(3, m, seed=2)
    real = np.asarray(x, np.float64) if not quantized else None
    if quantized:
        real = np.asarray(x.scale, np.float64)[:, None] * (
            np.asarray(x.codes, np.float64) - x.zero_point[:, None]
        )
    expected = real @ dense.T + bias
    found = int4_matmul(x, weight, out_dtype=jnp.float32, implementation="xla")
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("n", "m"), SHAPES[1:])
def test_tpu_kernel_equals_the_reference(n, m, quantized):
    weight = int4_weight([values(n, m)])
    x = tokens(5, m) if quantized else values(5, m).astype(jnp.bfloat16)
    operands = (
        (x.codes, x.sums, x.scale, x.zero_point)
        if quantized
        else (x, group_sums(x), jnp.ones(5), jnp.zeros(5))
    )
    expected = reference.matmul(*operands, weight, out_dtype=jnp.float32)
    found = tpu.matmul(*operands, weight, out_dtype=jnp.float32, interpret=True)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_accumulators_are_exact():
    # Steps of 1 around 8 leave integers; 8-bit codes at all sizes.
    codes = np.random.default_rng(0).integers(0, 16, (128, 640))
    codes[:, ::128], codes[:, 1::128] = 0, 15
    weight = int4_weight([jnp.asarray(codes, jnp.float32)])
    x = tokens(4, 640)
    exact = np.asarray(x.codes, np.int64) @ codes.T
    for implementation in (reference.matmul, functools.partial(tpu.matmul, interpret=True)):
        y = implementation(x.codes, x.sums, jnp.ones(4), jnp.zeros(4), weight, out_dtype=jnp.float32)
        np.testing.assert_array_equal(y, exact)


def test_matrices_that_share_an_input_are_one_product():
    parts = [values(n, 256, seed=n) for n in (64, 32)]
    x = values(2, 256)
    together = int4_matmul(x, int4_weight(parts), out_dtype=jnp.float32)
    apart = [int4_matmul(x, int4_weight([part]), out_dtype=jnp.float32) for part in parts]
    np.testing.assert_allclose(together, jnp.concatenate(apart, axis=1), rtol=1e-6)


def shapes(t, n, m, dtype):
    x = jax.ShapeDtypeStruct((t, m), dtype)
    sums = jax.eval_shape(group_sums, x)
    vector = jax.ShapeDtypeStruct((t,), jnp.float32)
    weight = jax.eval_shape(lambda: int4_weight([jnp.zeros((n, m))]))
    return x, sums, vector, vector, weight


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("target", ["v5e", "v6e", "v7x"])
def test_tpu_kernel_compiles(target, dtype, compile_for):
    function = functools.partial(tpu.matmul, out_dtype=jnp.bfloat16)
    compiled = compile_for(target, function, *shapes(8, 49152, 576, dtype))
    assert compiled.memory_analysis().temp_size_in_bytes < 49152 * 576 // 2


@pytest.mark.aot
@pytest.mark.parametrize(
    ("t", "n", "m", "dtype"), [(1, 49152, 576, jnp.bfloat16), (8, 32000, 4096, jnp.int8)]
)
def test_gpu_kernel_spills_nothing_and_copies_no_weights(t, n, m, dtype, compile_for_h100):
    function = functools.partial(gpu.matmul, out_dtype=jnp.bfloat16)
    compiled, reports = compile_for_h100(function, *shapes(t, n, m, dtype))
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
    assert compiled.memory_analysis().temp_size_in_bytes < n * m // 2
