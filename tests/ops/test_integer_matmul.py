"""Integer weights: the reference against float64, the kernels against the reference, and what they compile to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core.tensors import IntegerTensor, take_rows
from twla_jax.errors import TwlaError
from twla_jax.ops.integer_matmul import integer_matmul, integer_rows, integer_weight
from twla_jax.ops.ternary_matmul import gpu, reference, tpu
from twla_jax.ops.tokens import group_sums

# rows, columns, group size: whole tiles, a short last tile, an odd number of planes, a short last group, one a row.
SHAPES = [(128, 512, 128), (192, 576, 128), (130, 1000, 256), (64, 172, 128), (97, 576, 576)]

# One program each; their operations would each be compiled for every shape.
packed = jax.jit(integer_weight)
dense = jax.jit(IntegerTensor.dequantize)
packed_rows = jax.jit(integer_rows, static_argnums=2)
dense_rows = jax.jit(take_rows, static_argnums=2)


def matrix(n, m, size, bits):
    rng = np.random.default_rng(0)
    groups = -(-m // size)
    return IntegerTensor(
        codes=rng.integers(0, 2**bits, (n, m)).astype(np.uint8),
        scale=(0.1 + rng.random((n, groups))).astype(np.float16),
        zero_point=rng.integers(0, 2**bits, (n, groups)).astype(np.uint8),
        in_features=m,
        group_size=size,
        bits=bits,
    )


def activations(t, m, dtype):
    return (np.random.default_rng(1).normal(size=(t, m)) + 0.2).astype(dtype)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("n", "m", "size"), SHAPES)
def test_rows_are_those_of_the_tensor(n, m, size, bits):
    tensor, rows = matrix(n, m, size, bits), np.array([[0, n - 1], [7, 0]])
    found = packed_rows(packed(tensor), rows, jnp.float32)
    np.testing.assert_array_equal(found, dense_rows(tensor, rows, jnp.float32))


@pytest.mark.parametrize("rows", [3, [3], [[3]]])
def test_a_single_row_keeps_its_axes(rows):
    tensor, rows = matrix(64, 172, 128, 8), np.array(rows)
    found = packed_rows(packed(tensor), rows, jnp.bfloat16)
    np.testing.assert_array_equal(found, dense_rows(tensor, rows, jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("n", "m", "size"), SHAPES)
def test_reference_is_the_product_with_the_dequantised_matrix(n, m, size, bits, dtype):
    tensor, x = matrix(n, m, size, bits), activations(3, m, dtype)
    multiply = jax.jit(functools.partial(integer_matmul, out_dtype=jnp.float32, implementation="xla"))
    found = multiply(x, packed(tensor))
    expected = np.asarray(x, np.float64) @ np.asarray(dense(tensor), np.float64).T
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("bits", "t"), [(4, 5), (4, 40), (8, 1), (8, 40)])
@pytest.mark.parametrize(("n", "m", "size"), SHAPES)
def test_tpu_kernel_equals_the_reference(n, m, size, bits, t):
    weight, x = packed(matrix(n, m, size, bits)), activations(t, m, jnp.bfloat16)
    sums = np.asarray(jax.jit(group_sums)(x))
    expected = jax.jit(reference.product)(x, sums, weight)
    found = jax.jit(functools.partial(tpu.product, out_dtype=jnp.float32, interpret=True))(x, sums, weight)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_leading_axes_stay():
    x = activations(6, 172, jnp.float32).reshape(2, 3, 172)
    y = jax.jit(integer_matmul)(x, packed(matrix(64, 172, 128, 8)))
    assert y.shape == (2, 3, 64)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize(("n", "m"), [(32000, 4096), (151936, 4096)])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_take_a_quarter_of_a_bit_more_than_their_codes(n, m, bits):
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight_shape(n, m, bits)))
    assert size * 8 == (bits + 0.25) * n * m


def test_group_sizes_without_a_place_are_refused():
    with pytest.raises(TwlaError, match="group size 64"):
        integer_weight(matrix(8, 256, 64, 8))


def test_kernels_leave_float32_activations_to_the_reference():
    x, weight = jnp.asarray(activations(1, 172, jnp.float32)), packed(matrix(64, 172, 128, 8))
    with pytest.raises(TwlaError, match="float32, not bfloat16"):
        integer_matmul(x, weight, implementation="tpu")


def weight_shape(n, m, bits):
    def make():
        parameters = jnp.zeros((n, -(-m // 128)))
        tensor = IntegerTensor(
            codes=jnp.zeros((n, m), jnp.uint8),
            scale=parameters.astype(jnp.float16),
            zero_point=parameters.astype(jnp.uint8),
            in_features=m,
            group_size=128,
            bits=bits,
        )
        return integer_weight(tensor)

    return jax.eval_shape(make)


def shapes(t, n, m, bits):
    x = jax.ShapeDtypeStruct((t, m), jnp.bfloat16)
    return x, jax.eval_shape(group_sums, x), weight_shape(n, m, bits)


@pytest.mark.aot
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", ["v5e", "v6e", "v7x"])
def test_tpu_kernel_compiles(target, bits, compile_for):
    function = functools.partial(tpu.product, out_dtype=jnp.float32)
    compiled = compile_for(target, function, *shapes(8, 49152, 576, bits))
    assert compiled.memory_analysis().temp_size_in_bytes < 49152 * 576 * bits // 16


@pytest.mark.aot
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("t", "n", "m"), [(1, 49152, 576), (64, 32000, 4096), (8, 151936, 4096)])
def test_gpu_kernel_spills_nothing_and_copies_no_weights(t, n, m, bits, compile_for_h100):
    function = functools.partial(gpu.product, out_dtype=jnp.float32)
    compiled, reports = compile_for_h100(function, *shapes(t, n, m, bits))
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
    assert compiled.memory_analysis().temp_size_in_bytes < n * m * bits // 16


@pytest.mark.hlo
@pytest.mark.aot
@pytest.mark.parametrize(("target", "call"), [("h100", "mosaic_gpu"), ("v6e", "tpu_custom_call")])
def test_the_platform_picks_its_kernel(target, call, compile_for):
    x, _, weight = shapes(8, 32000, 4096, 4)
    assert call in compile_for(target, integer_matmul, x, weight).as_text()
