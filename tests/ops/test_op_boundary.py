"""What XLA puts between the ops of a quantised linear."""

import re

import jax
import jax.numpy as jnp
import pytest

from twla_jax import kotms, ternary
from twla_jax.ops.rotate_quantize import kernel_rotation, rotate_quantize
from twla_jax.ops.ternary_matmul import kernel_weight, ternary_matmul


@pytest.mark.aot
@pytest.mark.parametrize(
    ("t", "left", "right", "n", "norm"), [(1, 64, 64, 12288, True), (8, 86, 128, 4096, False)]
)
def test_a_quantised_linear_is_two_kernels_on_a_gpu(t, left, right, n, norm, compile_for):
    m = left * right
    factors = [jnp.zeros((size, size), jnp.float16) for size in (left, right)]
    matrix = ternary.from_codes(
        jnp.zeros((n, m), jnp.int8), jnp.zeros((n, m // 128)), jnp.zeros((n, m // 128)), 128
    )
    rotation, weight = jax.eval_shape(
        lambda: (kernel_rotation(kotms.KroneckerRotation(*factors), jnp.bfloat16), kernel_weight([matrix]))
    )

    def linear(x, rotation, settings, scale, weight):
        tokens = rotate_quantize(x, rotation, settings, norm_scale=scale, epsilon=1e-5)
        return ternary_matmul(tokens, weight)

    scale = jax.ShapeDtypeStruct((m,), jnp.float32) if norm else None
    x, settings = jax.ShapeDtypeStruct((t, m), jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.float32)
    text = compile_for("h100", linear, x, rotation, settings, scale, weight).as_text()
    assert len(re.findall(r" custom-call\(", text)) == 2
    assert not re.search(r" (fusion|copy|pad|reduce|transpose)\(", text)
