"""Norm, rotation and codes in one: the reference against the method's own parts, the kernels against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax import activation, kotms
from twla_jax.errors import TwlaError
from twla_jax.ops.rotate_quantize import (
    gpu,
    kernel_rotation,
    quantizer_settings,
    reference,
    rotate_quantize,
    tpu,
)
from twla_jax.ops.tokens import group_sums

SIZES = [
    (64, 64),
    (24, 24),
    (5, 128),
    (8, 224),
    (4, 80),
]  # left and right; 5 rows are filled up, 80 columns cut groups
CLIP = jnp.float32(0.9)


def rotation_of(left, right, seed=0):
    rng = np.random.default_rng(seed)
    factors = [np.linalg.qr(rng.normal(size=(size, size)))[0].astype(np.float16) for size in (left, right)]
    return kotms.KroneckerRotation(*map(jnp.asarray, factors))


def values(t, m, dtype=jnp.bfloat16):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(t, m)) + 0.3, dtype), jnp.asarray(rng.random(m) + 0.5, jnp.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reference_is_the_method(dtype, bits):
    rotation = rotation_of(6, 32)
    x, scale = values(3, 192, dtype)
    prepared = kernel_rotation(rotation, dtype)
    tokens = rotate_quantize(
        x.reshape(1, 3, 192), prepared, quantizer_settings(bits, CLIP), implementation="xla"
    )
    expected = activation.fake_quantize(rotation(x), bits, CLIP)
    found = tokens.scale[..., None] * (tokens.codes - tokens.zero_point[..., None])
    np.testing.assert_array_equal(found.astype(dtype)[0], expected)
    np.testing.assert_array_equal(tokens.sums, group_sums(tokens.codes))
    normed = rotate_quantize(
        x, prepared, quantizer_settings(bits, CLIP), norm_scale=scale, epsilon=1e-5, implementation="xla"
    )
    x = reference.rms_norm(x, scale, 1e-5)
    again = rotate_quantize(x, prepared, quantizer_settings(bits, CLIP), implementation="xla")
    np.testing.assert_array_equal(normed.codes, again.codes)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("left", "right"), SIZES)
def test_tpu_kernel_equals_the_reference(left, right, norm):
    rotation = kernel_rotation(rotation_of(left, right), jnp.bfloat16)
    x, scale = values(3, left * right)
    arguments = (x, rotation, quantizer_settings(8, CLIP), scale if norm else None)
    expected = reference.rotate_quantize(*arguments, epsilon=1e-5)
    found = tpu.rotate_quantize(*arguments, epsilon=1e-5, interpret=True)
    assert_close(found, expected)


@pytest.mark.usefixtures("interpreted_gpu")
@pytest.mark.parametrize(("left", "right", "norm"), [(64, 64, True), (5, 128, False)])
def test_gpu_kernel_equals_the_reference(left, right, norm):
    rotation = kernel_rotation(rotation_of(left, right), jnp.bfloat16)
    x, scale = values(2, left * right)
    arguments = (x, rotation, quantizer_settings(8, CLIP), scale if norm else None)
    expected = reference.rotate_quantize(*arguments, epsilon=1e-5)
    assert_close(gpu.rotate_quantize(*arguments, epsilon=1e-5), expected)


def assert_close(found, expected):
    """Equal but for codes on the edge between two levels, which sums in another order may push across."""
    difference = np.abs(np.asarray(found.codes, int) - np.asarray(expected.codes, int))
    assert difference.max() <= 1
    assert difference.mean() < 0.01
    np.testing.assert_array_equal(found.sums, group_sums(found.codes))
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-2)
    np.testing.assert_allclose(found.zero_point, expected.zero_point, atol=1)


def test_kernels_refuse_what_they_cannot_take():
    x, _ = values(1, 64 * 24, jnp.float32)
    rotation = kernel_rotation(rotation_of(64, 24), jnp.float32)
    for dtype, reason in ((jnp.float32, "float32, not bfloat16"), (jnp.bfloat16, "24 rows, not a multiple")):
        with pytest.raises(TwlaError, match=reason):
            rotate_quantize(x.astype(dtype), rotation, quantizer_settings(4, CLIP), implementation="gpu")


def test_what_four_warps_cannot_share_is_left_to_the_reference():
    x, _ = values(1, 16 * 16)
    rotation = kernel_rotation(rotation_of(16, 16), jnp.bfloat16)
    rotate_quantize(x, rotation, quantizer_settings(4, CLIP))
    with pytest.raises(TwlaError, match="16×16"):
        rotate_quantize(x, rotation, quantizer_settings(4, CLIP), implementation="gpu")


def shapes(t, left, right, norm):
    rotation = jax.eval_shape(lambda: kernel_rotation(rotation_of(left, right), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((t, left * right), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((left * right,), jnp.float32)
    return x, rotation, jax.ShapeDtypeStruct((3,), jnp.float32), scale if norm else None


@pytest.mark.aot
@pytest.mark.parametrize(("left", "right", "norm"), [(64, 64, True), (86, 128, False), (24, 24, True)])
@pytest.mark.parametrize("target", ["v5e", "v6e", "v7x"])
def test_tpu_kernel_compiles(target, left, right, norm, compile_for):
    compile_for(target, functools.partial(tpu.rotate_quantize, epsilon=1e-5), *shapes(9, left, right, norm))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("left", "right", "norm"), [(64, 64, True), (86, 128, False), (64, 128, True), (32, 48, False)]
)
def test_gpu_kernel_spills_nothing(left, right, norm, compile_for_h100):
    function = functools.partial(gpu.rotate_quantize, epsilon=1e-5)
    _, reports = compile_for_h100(function, *shapes(3, left, right, norm))
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
