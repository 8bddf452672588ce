"""What `twla_jax.ops` exports: functions and their operands, by the names that its docstring uses."""

import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax import ops
from twla_jax.core.tensors import dequantize

from helpers.ternary_operands import matrix


def test_names_are_never_the_folders_of_the_same_name():
    for name in ops.__all__:
        if importlib.util.find_spec(f"twla_jax.ops.{name}"):
            importlib.import_module(f"twla_jax.ops.{name}.api")
        assert not isinstance(getattr(ops, name), types.ModuleType), name


def test_every_export_says_what_it_is():
    assert [name for name in ops.__all__ if name != "Implementation" and not getattr(ops, name).__doc__] == []


def test_a_product_of_codes_with_ternary_weights_is_that_of_the_numbers_they_stand_for():
    tensor = matrix(48, 256, 128)
    x = jax.random.normal(jax.random.key(0), (3, 256))

    @jax.jit
    def product(x, tensor):
        tokens = ops.rotate_quantize(x, None, ops.quantizer_settings(bits=8, clip=0.9))
        return tokens, ops.ternary_matmul(tokens, ops.kernel_weight([tensor]), out_dtype=jnp.float32)

    tokens, y = product(x, tensor)
    expected = np.asarray(tokens.dequantize(), float) @ np.asarray(dequantize(tensor, jnp.float32), float).T
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
