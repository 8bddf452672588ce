"""A linear in one op: equal to its two ops, and one kernel where there is one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.benchmark import shapes
from twla_jax.ops.quantized_linear import gpu, quantized_linear
from twla_jax.ops.rotate_quantize import quantizer_settings, rotate_quantize
from twla_jax.ops.ternary_matmul import ternary_matmul

SETTINGS = quantizer_settings(4, 0.9)


def operands(t, m, n, *, make=lambda make, *args: make(*args)):
    key = jax.random.key(0)
    rotation = make(lambda: shapes.rotation_for_kernels(key, m, n))
    weight = make(lambda: shapes.weight(key, n, m))
    x, residual, scale = (
        make(lambda size=size: jax.random.normal(key, size).astype(jnp.bfloat16))
        for size in ((t, m), (t, n), (m,))
    )
    return x, rotation, weight, scale, residual


@pytest.mark.parametrize("t", [1, 3])
def test_it_is_its_two_ops_and_the_residual(t):
    x, rotation, weight, scale, residual = operands(t, 1024, 256)
    tokens = rotate_quantize(x, rotation, SETTINGS, norm_scale=scale, epsilon=1e-5)
    expected = residual + ternary_matmul(tokens, weight)
    found = quantized_linear(
        x[None], rotation, SETTINGS, weight, norm_scale=scale, epsilon=1e-5, residual=residual[None]
    )
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("m", "n", "norm", "residual"),
    [
        (4096, 12288, True, False),
        (4096, 4096, False, True),
        (11008, 4096, False, True),
        (8192, 1024, True, False),
    ],
)
def test_gpu_kernel_spills_nothing(m, n, norm, residual, compile_for_h100):
    x, rotation, weight, scale, added = operands(1, m, n, make=jax.eval_shape)
    function = functools.partial(gpu.quantized_linear, epsilon=1e-5, out_dtype=jnp.bfloat16)
    settings = jax.ShapeDtypeStruct((3,), jnp.float32)
    _, reports = compile_for_h100(
        function, x, rotation, settings, weight, scale if norm else None, added if residual else None
    )
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]


@pytest.mark.aot
@pytest.mark.parametrize("m", [4096, 5120])
def test_a_single_token_takes_one_kernel(m, compile_for):
    def linear(x, rotation, weight, scale, residual):
        return quantized_linear(
            x, rotation, SETTINGS, weight, norm_scale=scale, epsilon=1e-5, residual=residual
        )

    program = compile_for("h100", linear, *operands(1, m, 1024, make=jax.eval_shape)).as_text()
    found = re.findall(r"^ .*? = .*? ([\w-]+)\(", program[program.index("ENTRY") :], re.MULTILINE)
    work = [name for name in found if name not in ("parameter", "constant", "bitcast", "get-tuple-element")]
    assert work == ["custom-call"]
