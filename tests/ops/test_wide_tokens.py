"""Activations of 16 bits as two int8 parts: how exact they are, and what integer kernels make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.bench import shapes
from twla_jax.ops.quantized_linear import quantized_linear
from twla_jax.ops.rotate_quantize import rotate_quantize
from twla_jax.ops.ternary_matmul import ternary_matmul
from twla_jax.ops.tokens import wide_tokens

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_two_parts_hold_a_token_to_a_129540th_of_its_range(offset):
    x = (RNG.standard_t(3, (7, 600)) + offset).astype(np.float32)
    tokens = jax.jit(wide_tokens)(x)
    parts = np.asarray(tokens.codes, np.float64) - np.asarray(tokens.zero_point, np.float64)[..., None]
    found = (parts * np.asarray(tokens.scale, np.float64)[..., None]).sum(0)
    span = np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0) if offset == 0 else x.max(-1) - x.min(-1)
    # Half a step of the second part, and the rounding of float32 numbers as large as these.
    bound = span[:, None] / 129540 + 2.0**-22 * np.abs(x).max()
    assert (np.abs(found - x) <= bound).all()


def test_the_product_of_wide_tokens_is_that_of_the_tokens_in_float64():
    weight = shapes.weight(jax.random.key(0), 256, 1024)
    x = RNG.normal(size=(3, 1024)).astype(np.float32)
    residual = RNG.normal(size=(3, 256)).astype(np.float32)
    exact = ternary_matmul(jnp.asarray(x), weight, out_dtype=jnp.float32, implementation="xla")
    found = ternary_matmul(
        wide_tokens(jnp.asarray(x)),
        weight,
        jnp.asarray(residual),
        out_dtype=jnp.float32,
        implementation="xla",
    )
    error = np.abs(np.asarray(found) - residual - np.asarray(exact))
    assert error.max() < 1e-4 * np.abs(np.asarray(exact)).max()


def test_a_linear_without_settings_is_rotation_and_wide_codes():
    key = jax.random.key(0)
    rotation, weight = shapes.rotation_for_kernels(key, 1024, 256), shapes.weight(key, 256, 1024)
    x = jax.random.normal(key, (2, 1024)).astype(jnp.bfloat16)
    tokens = rotate_quantize(x, rotation, None)
    assert tokens.wide
    assert tokens.codes.shape == (2, 2, 1024)
    expected = ternary_matmul(tokens, weight, implementation="xla")
    found = quantized_linear(x, rotation, None, weight, implementation="xla")
    np.testing.assert_array_equal(found, expected)
