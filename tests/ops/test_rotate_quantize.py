"""Norm, rotation and codes in one: the reference against the method's own steps, the kernels against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from twla_jax.core import activation, kotms
from twla_jax.errors import TwlaError
from twla_jax.ops.hopper.gate import silu_gate_pairs
from twla_jax.ops.rotate_quantize import (
    gpu,
    gpu_rotation,
    kernel_rotation,
    quantizer_settings,
    reference,
    rotate_quantize,
    tpu,
)
from twla_jax.ops.tokens import group_sums

from helpers import emulated_machine, emulated_threads
from helpers.token_operands import permutation, rotated

SIZES = [
    (64, 64),
    (24, 24),
    (5, 128),
    (8, 224),
    (4, 80),
]  # left and right; 5 rows are padded, 80 columns cut groups
CLIP = jnp.float32(0.9)

# One program each; their operations would each be compiled for every shape. Numbers are rounded to bfloat16 wherever
# that is written, as by these operations.
compiled = functools.partial(
    jax.jit,
    static_argnames=("epsilon", "gated"),
    compiler_options={"xla_allow_excess_precision": False},
)
by_reference = compiled(reference.rotate_quantize)
by_tpu_kernel = compiled(functools.partial(tpu.rotate_quantize, interpret=True))
laid_out = jax.jit(kernel_rotation, static_argnums=1)


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gate_is_silu_and_product_before_it(dtype):
    rotation = kernel_rotation(rotation_of(6, 32), dtype)
    gate, up = values(3, 192, dtype)[0], values(3, 192, dtype)[0][::-1]
    op = functools.partial(
        rotate_quantize, rotation=rotation, settings=quantizer_settings(8, CLIP), norm_scale=jnp.ones(192)
    )
    found, expected = op(jnp.concatenate([gate, up], axis=1), gated=True), op(jax.nn.silu(gate) * up)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("left", "right", "norm", "gated"),
    [
        *((*size, both, both) for size in SIZES for both in (False, True)),
        *((*size, norm, not norm) for size in SIZES[1:3] for norm in (False, True)),
    ],
)
def test_tpu_kernel_equals_the_reference(left, right, norm, gated):
    arguments, options = kernel_operands(left, right, norm, gated)
    expected = by_reference(*arguments, **options)
    assert_close(by_tpu_kernel(*arguments, **options), expected)


@pytest.mark.parametrize(
    ("left", "right", "norm", "gated"),
    [
        (24, 64, True, False),  # one warpgroup, padded rows
        (8, 24, True, False),  # padded columns, and a group of 128 that ends in the second row
        (20, 128, False, True),
        (32, 96, True, True),
        (5, 128, False, False),
    ],
)
def test_gpu_kernel_equals_the_reference_thread_by_thread(left, right, norm, gated, monkeypatch):
    (x, *arguments), options = kernel_operands(left, right, norm, gated)
    expected = by_reference(x, *arguments, **options)
    emulated_threads.emulate(monkeypatch)
    emulated_threads.emulate_kernel(monkeypatch, pl)
    monkeypatch.setattr(gpu_rotation, "rotate", rotated)
    for blocks in (2, 3):  # one has two of the three tokens, or each has one
        monkeypatch.setattr(gpu, "STREAMING_MULTIPROCESSORS", blocks)
        monkeypatch.setattr(gpu, "WARPGROUPS", max(1, right // 64))
        assert_close(gpu.rotate_quantize(x, *arguments, **options), expected)


@pytest.mark.parametrize(("left", "right", "gated"), [(8, 24, False), (20, 128, True)])
def test_gpu_kernel_makes_codes_of_16_bits(left, right, gated, monkeypatch):
    (x, rotation, _, norm), options = kernel_operands(left, right, True, gated)
    expected = by_reference(x, rotation, None, norm, **options)
    emulated_threads.emulate(monkeypatch)
    emulated_threads.emulate_kernel(monkeypatch, pl)
    monkeypatch.setattr(gpu_rotation, "rotate", rotated)
    monkeypatch.setattr(gpu, "STREAMING_MULTIPROCESSORS", 2)
    monkeypatch.setattr(gpu, "WARPGROUPS", max(1, right // 64))
    found = gpu.rotate_quantize(x, rotation, None, norm, **options)
    assert found.wide
    # The norm's and the gate's sums may be rounded differently before, by a bf16 step.
    whole, other = (np.asarray(tokens.dequantize()) for tokens in (found, expected))
    assert np.linalg.norm(whole - other) < 2.0**-8 * np.linalg.norm(other)
    assert np.mean(found.codes[0] == expected.codes[0]) > 0.99
    np.testing.assert_array_equal(found.sums, group_sums(found.codes))


def test_half_way_between_two_codes_the_gpu_kernel_takes_the_even_one(monkeypatch):
    """A division gives that, a product with `1 / scale` does not."""
    rng = np.random.default_rng(0)
    rotation = permutation(kernel_rotation(rotation_of(8, 24), jnp.bfloat16))
    x = jnp.asarray([1.5 * rng.permutation(np.arange(192) % 31) for _ in range(3)], jnp.bfloat16)
    turned_x = np.asarray(kotms.rotate(x, *rotation.factors), np.float32)
    emulated_threads.emulate(monkeypatch)
    emulated_threads.emulate_kernel(monkeypatch, pl)
    monkeypatch.setattr(gpu_rotation, "rotate", rotated)
    found = gpu.rotate_quantize(x, rotation, quantizer_settings(4, 1.0), None, epsilon=0.0)
    np.testing.assert_array_equal(found.scale, 3)
    np.testing.assert_array_equal(found.codes, np.minimum(np.round(turned_x / np.float32(3)), 15) - 8)


def test_the_gate_in_the_gpu_kernel_is_that_of_xla_bit_by_bit(monkeypatch):
    largest = jnp.finfo(jnp.bfloat16).max
    gate = jnp.concatenate([jnp.linspace(-100, 100, 4092), jnp.array([-0.0, 1e-30, -largest, largest])])
    gate, x = gate.astype(jnp.bfloat16), jnp.full(gate.shape, 0.3, jnp.bfloat16)
    emulated_threads.emulate(monkeypatch)
    emulated_machine.start(512)

    def words(each):
        parts = np.asarray(each).view(np.uint32).reshape(1, 512, 4)
        return [emulated_threads.Word(parts[..., i]) for i in range(4)]

    found = np.stack([each.value for each in silu_gate_pairs(words(gate), words(x))], -1)
    np.testing.assert_array_equal(found.reshape(-1).view(jnp.bfloat16), jax.nn.silu(gate) * x)


def kernel_operands(left, right, norm, gated):
    rotation = laid_out(rotation_of(left, right), jnp.bfloat16)
    _, scale = values(3, left * right)
    x, _ = values(3, left * right * (2 if gated else 1))
    arguments = (x, rotation, quantizer_settings(8, CLIP), scale if norm else None)
    return arguments, {"epsilon": 1e-5, "gated": gated}


def assert_close(found, expected):
    """Assert equality, but for codes on the edge between two levels, which sums in another order may move across."""
    difference = np.abs(np.asarray(found.codes, int) - np.asarray(expected.codes, int))
    assert difference.max() <= 1
    assert difference.mean() < 0.01
    np.testing.assert_array_equal(found.sums, group_sums(found.codes))
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-2)
    np.testing.assert_allclose(found.zero_point, expected.zero_point, atol=1)


@pytest.mark.parametrize(
    ("left", "right", "dtype", "reason"),
    [
        (64, 24, jnp.float32, "float32, not bfloat16"),
        (64, 20, jnp.bfloat16, "20 rows, not a multiple of 8"),
        (144, 64, jnp.bfloat16, "144 rows, more than 128"),
        (64, 384, jnp.bfloat16, "take .* bytes, more than"),
    ],
)
def test_what_the_gpu_kernel_cannot_take_runs_on_the_reference(left, right, dtype, reason):
    rotation = kernel_rotation(rotation_of(left, right), dtype)
    operands = values(1, left * right, dtype)[0], rotation, quantizer_settings(4, CLIP)
    rotate_quantize(*operands)  # traces every platform's branch
    with pytest.raises(TwlaError, match=reason):
        rotate_quantize(*operands, implementation="gpu")


def shapes(t, left, right, norm, gated=False):
    rotation = jax.eval_shape(lambda: kernel_rotation(rotation_of(left, right), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((t, left * right * (2 if gated else 1)), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((left * right,), jnp.float32)
    return x, rotation, jax.ShapeDtypeStruct((3,), jnp.float32), scale if norm else None


@pytest.mark.aot
@pytest.mark.parametrize(("left", "right", "norm"), [(64, 64, True), (86, 128, False), (24, 24, True)])
@pytest.mark.parametrize("target", ["v5e", "v6e", "v7x"])
def test_tpu_kernel_compiles(target, left, right, norm, compile_for):
    compile_for(target, functools.partial(tpu.rotate_quantize, epsilon=1e-5), *shapes(9, left, right, norm))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("left", "right", "norm", "gated"),
    [
        (64, 64, True, False),
        (86, 128, False, False),
        (86, 128, False, True),
        (64, 128, True, False),
        (24, 24, True, False),
        (32, 48, False, True),
        (112, 128, False, True),
        (128, 224, False, True),
    ],
)
@pytest.mark.parametrize("t", [8, 2048])  # a block for each token, or one for several
def test_gpu_kernel_spills_nothing(t, left, right, norm, gated, compile_for_h100):
    function = functools.partial(gpu.rotate_quantize, epsilon=1e-5, gated=gated)
    _, reports = compile_for_h100(function, *shapes(t, left, right, norm, gated))
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]
