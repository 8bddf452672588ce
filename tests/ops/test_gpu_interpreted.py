"""The GPU kernels' copies, barriers and sums, interpreted on a CPU; what is written against registers stands aside."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax import ternary
from twla_jax.ops.int4_matmul import int4_weight
from twla_jax.ops.ternary_matmul import gpu, gpu_prefill, kernel_weight, reference
from twla_jax.ops.ternary_matmul.tiles import GpuTiles
from twla_jax.ops.tokens import group_sums


@pytest.fixture(autouse=True)
def plain_arithmetic(monkeypatch):
    """Unpacking and products as the interpreter can compute them; columns stay in their order."""

    def unpack(packed, plane, planes, dtype, *, wide=False):
        bits = 8 // planes
        return ((packed >> (bits * plane)) & (2**bits - 1)).astype(dtype)

    def product(codes, x_ref):
        exact = jnp.int32 if codes.dtype == jnp.int8 else jnp.float32
        return jnp.dot(codes, x_ref[...], preferred_element_type=exact)

    for module in (gpu, gpu_prefill):
        monkeypatch.setattr(module, "unpack", unpack)
    monkeypatch.setattr(gpu, "unpacked_order", lambda x: x)
    monkeypatch.setattr(gpu, "_all_have_read", lambda: None)
    monkeypatch.setattr(gpu_prefill, "_product", product)
    monkeypatch.setattr(plgpu, "mma", lambda acc, a, b: acc + jnp.dot(a, b, preferred_element_type=acc.dtype))


def operands(t, m, dtype):
    rng = np.random.default_rng(1)
    x = rng.integers(-128, 128, (t, m)) if dtype == jnp.int8 else rng.normal(size=(t, m))
    x = jnp.asarray(x, dtype)
    return (
        x,
        group_sums(x),
        jnp.asarray(rng.random(t), jnp.float32),
        jnp.asarray(rng.normal(size=t), jnp.float32),
    )


def ternary_weight(n, m, size):
    rng = np.random.default_rng(0)
    parameters = rng.normal(size=(2, n, -(-m // size)))
    codes = jnp.asarray(rng.integers(-1, 2, (n, m)), jnp.int8)
    bias = jnp.asarray(rng.normal(size=n))
    return kernel_weight([ternary.from_codes(codes, *map(jnp.asarray, parameters), size)], [bias])


# 3 tokens leave a block unfilled, 19 take two, 40 are prefill; 1100 columns are three tiles, more than a ring of two.
@pytest.mark.parametrize(
    ("t", "m", "size", "dtype", "tiles"),
    [
        (3, 1100, 128, jnp.int8, GpuTiles(rows=64, warpgroups=1, stages=2)),
        (19, 1100, 128, jnp.bfloat16, None),
        (8, 576, 576, jnp.int8, None),
        (40, 1100, 128, jnp.int8, None),
        (40, 1100, 128, jnp.bfloat16, None),
        (40, 576, 576, jnp.int8, None),
    ],
)
def test_ternary_kernel_equals_the_reference(t, m, size, dtype, tiles):
    check(ternary_weight(96, m, size), operands(t, m, dtype), tiles)


@pytest.mark.parametrize("t", [3, 40])
def test_int4_kernel_equals_the_reference(t):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(96, 640)), jnp.float32)
    check(int4_weight([matrix]), operands(t, 640, jnp.int8), None)


def check(weight, x, tiles):
    expected = reference.matmul(*x, weight, out_dtype=jnp.float32)
    found = gpu.matmul(*x, weight, out_dtype=jnp.float32, tiles=tiles, interpret=plgpu.InterpretGPUParams())
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())
