"""A linear in one op: equal to its two ops, and one kernel where there is one."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from twla_jax.bench import SHAPES, shapes
from twla_jax.core import tensors
from twla_jax.ops.quantized_linear import gpu, gpu_linear, linear_tiles, quantized_linear, reference
from twla_jax.ops.rotate_quantize import (
    gpu_rotation,
    quantizer_settings,
    rotate_quantize,
)
from twla_jax.ops.ternary_matmul import (
    gpu_ring,
    kernel_weight,
    ring_tiles,
    ternary_matmul,
)

from helpers import emulated_threads
from helpers.token_operands import in_splits, permutation, random_key, rotated

SETTINGS = quantizer_settings(4, 0.9)


def operands(t, m, n, *, make=lambda make, *args: make(*args)):
    key = random_key()
    rotation = make(lambda: shapes.rotation_for_kernels(key, m, n))
    weight = make(lambda: shapes.weight(key, n, m))
    x, residual, scale = (
        make(lambda size=size: jax.random.normal(key, size).astype(jnp.bfloat16))
        for size in ((t, m), (t, n), (m,))
    )
    return x, rotation, weight, scale, residual


# One program for each shape; its operations would each be compiled.
made = functools.partial(jax.jit, static_argnums=range(3))(operands)


@pytest.mark.parametrize("t", [1, 3])
def test_it_is_its_two_ops_and_the_residual(t):
    x, rotation, weight, scale, residual = made(t, 1024, 256)
    tokens = rotate_quantize(x, rotation, SETTINGS, norm_scale=scale, epsilon=1e-5)
    expected = residual + ternary_matmul(tokens, weight)
    found = quantized_linear(
        x[None], rotation, SETTINGS, weight, norm_scale=scale, epsilon=1e-5, residual=residual[None]
    )
    np.testing.assert_array_equal(found[0], expected)


def test_attention_in_parts_is_merged_first():
    _, rotation, weight, _, residual = made(2, 1024, 256)
    parts = in_splits(2, 1024, 8)
    shares = jnp.array([0.5, 0.25, 0, 0.25])
    whole = jnp.einsum("tpm,p->tm", parts.mixed.astype(jnp.float32), shares).astype(jnp.bfloat16)
    found, expected = (
        quantized_linear(x, rotation, SETTINGS, weight, residual=residual) for x in (parts, whole)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("t", "m", "n", "size", "warpgroups", "rows", "stages", "kind"),
    [
        (1, 1024, 256, 128, 2, 96, 1, "norm"),
        (1, 2560, 64, 128, 2, 64, (2, 2), "residual"),
        (1, 576, 96, 576, 2, 32, 1, "norm"),
        (1, 576, 128, 128, 2, 40, 1, "gated"),
        (2, 576, 128, 576, 2, 40, 1, "gated"),
        (1, 1536, 64, 128, 1, 32, 2, "residual"),
        (2, 1024, 256, 128, 2, 96, 1, "norm"),
        (4, 576, 96, 576, 2, 96, 1, "norm"),
        (2, 576, 128, 128, 2, 40, 1, "gated"),
        (3, 1536, 64, 128, 1, 32, 2, "residual"),
        (4, 2048, 24, 128, 4, 32, 1, "residual"),
        (1, 1024, 256, 128, 2, 96, 1, "splits"),
        (2, 576, 96, 576, 2, 32, 1, "splits"),
        (2, 576, 512, 128, 2, 40, 1, "gated"),  # seven blocks' rows on four multiprocessors take two passes
        (1, 1024, 256, 128, 2, 96, 1, "wide norm"),
        (1, 576, 128, 128, 2, 40, 1, "wide gated"),
        (2, 1536, 64, 128, 1, 32, 2, "wide residual"),
    ],
)
def test_gpu_kernel_thread_by_thread(t, m, n, size, warpgroups, rows, stages, kind, monkeypatch):
    x, rotation, weight, scale, residual = made(t, m, n)
    rotation = permutation(rotation)  # exact in every order of additions, so that codes are equal
    if size == m:
        weight = ungrouped(n, m)
    wide, kind = kind.startswith("wide"), kind.removeprefix("wide ")
    gated = kind == "gated"
    if gated:
        weight = dataclasses.replace(weight, splits=(n // 2, n // 2))
    if kind == "splits":
        x = in_splits(t, m, m // 64)
    arguments = (
        x,
        rotation,
        None if wide else SETTINGS,
        weight,
        None if kind in ("residual", "splits") else scale.astype(jnp.float32) if m == 576 else scale,
        None if kind == "norm" else residual[:, : n // 2] if gated else residual,
    )
    # With a gate, outputs are rounded before it, and sigmoids may round differently.
    dtype, tolerance = (jnp.bfloat16, 1e-2) if gated else (jnp.float32, 1e-5)
    if wide and not gated:  # what one step of a second part weighs, where two ways round it apart
        tolerance = 1e-4
    options = {"epsilon": 1e-5, "gated": gated, "out_dtype": dtype}
    expected = jax.jit(functools.partial(reference.quantized_linear, implementation="xla", **options))(
        *arguments
    )
    emulated_threads.emulate(monkeypatch)
    emulated_threads.emulate_kernel(monkeypatch, pl)
    monkeypatch.setattr(gpu_rotation, "rotate", rotated)
    monkeypatch.setattr(gpu_ring, "STREAMING_MULTIPROCESSORS", 4)
    stages, together = stages if isinstance(stages, tuple) else (stages, 1)
    chosen = ring_tiles.RingTileConfig(rows=rows, warpgroups=warpgroups, stages=stages, together=together)
    found = np.asarray(gpu.quantized_linear(*arguments, config=chosen, **options), np.float32)
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def ungrouped(n, m):
    """Return a weight with one (α, μ) a row."""
    rng = np.random.default_rng(0)
    alpha, mu = rng.normal(size=(2, n, 1))
    codes = jnp.asarray(rng.integers(-1, 2, (n, m)), jnp.int8)
    return jax.jit(lambda *parts: kernel_weight([tensors.from_codes(*parts, m)]))(codes, alpha, mu)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("t", "m", "n", "kind"),
    [
        (1, 4096, 12288, "norm"),
        (1, 4096, 4096, "residual"),
        (1, 11008, 4096, "residual"),
        (1, 8192, 1024, "norm"),
        (1, 576, 960, "norm"),
        (1, 1536, 576, "residual"),
        (2, 4096, 12288, "norm"),
        (2, 4096, 4096, "residual"),
        (2, 4096, 22016, "gated"),
        (2, 11008, 4096, "residual"),
        (2, 576, 960, "norm"),
        (3, 11008, 4096, "residual"),
        (4, 4096, 12288, "norm"),
        (4, 4096, 4096, "residual"),
        (4, 4096, 22016, "gated"),
        (4, 8192, 57344, "gated"),
        (4, 1536, 576, "residual"),
        (1, 4096, 4096, "splits"),
        (1, 8192, 8192, "splits"),
        (2, 4096, 4096, "splits"),
        (1, 4096, 12288, "wide norm"),
        (1, 11008, 4096, "wide residual"),
        (1, 4096, 22016, "wide gated"),
        (2, 4096, 22016, "wide gated"),
        (2, 4096, 4096, "wide residual"),
    ],
)
def test_gpu_kernel_spills_nothing(t, m, n, kind, compile_for_h100):
    x, rotation, weight, scale, added = operands(t, m, n, make=jax.eval_shape)
    wide, kind = kind.startswith("wide"), kind.removeprefix("wide ")
    gated = kind == "gated"
    if gated:
        weight = dataclasses.replace(weight, splits=(n // 2, n // 2))
    function = functools.partial(gpu.quantized_linear, epsilon=1e-5, gated=gated, out_dtype=jnp.bfloat16)
    settings = None if wide else jax.ShapeDtypeStruct((3,), jnp.float32)
    scale = jax.ShapeDtypeStruct(scale.shape, jnp.float32) if m == 576 else scale
    norm, residual = (scale, None) if kind in ("norm", "gated") else (None, added)
    if kind == "splits":
        x = jax.eval_shape(lambda: in_splits(t, m, m // 128))
    assert gpu_linear.obstacle(x, rotation, weight, gated=gated, wide=wide) is None
    _, reports = compile_for_h100(function, x, rotation, settings, weight, norm, residual)
    assert reports == ["0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"]


@pytest.mark.parametrize(
    ("m", "n", "gated", "most", "reason"),
    [
        (4096, 22016, True, 4, "tokens, not 1 to 4"),
        (11008, 4096, False, 3, "more than there are registers for"),
        (8192, 57344, True, 4, "tokens, not 1 to 4"),
    ],
)
def test_more_tokens_than_one_kernel_is_good_for_are_two_ops(m, n, gated, most, reason):
    x, rotation, weight, *_ = operands(most + 1, m, n, make=jax.eval_shape)
    if gated:
        weight = dataclasses.replace(weight, splits=(n // 2, n // 2))
    obstacle = functools.partial(gpu_linear.obstacle, rotation=rotation, weight=weight, gated=gated)
    assert all(obstacle(jax.ShapeDtypeStruct((t, m), x.dtype)) is None for t in range(1, most + 1))
    assert reason in obstacle(x)


def test_tiles_fit_memory_and_threads():
    for rows in (64, 576, 1536, 4096, 11008, 28672, 57344, 152064):
        for parts in (1, 2):
            for columns in (1, 2, 8, 16):
                for lines in (1, 2, 4):
                    chosen = linear_tiles.tile_config(rows, parts, columns, lines, 40_000)
                    assert chosen.rows % 8 == 0
                    assert lines <= chosen.warpgroups <= ring_tiles.MOST_WARPGROUPS
                    assert chosen.rows <= 128 * chosen.warpgroups
                    assert chosen.rows * parts <= ring_tiles.MOST_ROWS
                    tile = (chosen.rows * 128 + -(-chosen.rows // 16) * 16 * 8) * parts
                    used = chosen.warpgroups * chosen.stages * chosen.together * tile
                    assert used + 40_000 <= 226 * 1024
                    if chosen.together > 1:  # every tile has its own place
                        assert chosen.warpgroups * chosen.stages * chosen.together >= columns
                    if chosen.stages * chosen.together == 1 and columns > chosen.warpgroups:
                        assert 2 * used + 40_000 > 226 * 1024  # no room for a second
    with pytest.raises(ValueError, match="leave no room"):
        linear_tiles.tile_config(4096, 1, 8, 2, 230_000)


def test_measured_tiles_come_before_the_rule():
    published = {
        (n // (2 if name == "gate,up" else 1), 2 if name == "gate,up" else 1, -(-m // 512))
        for config in SHAPES.values()
        for name, (n, m) in shapes.matrices(config).items()
    }
    assert set(linear_tiles.TUNED) <= published
    for shape, measured in linear_tiles.TUNED.items():
        assert linear_tiles.tile_config(*shape, 2, 40_000) == measured
        assert linear_tiles.tile_config(*shape, 2, 40_000, tokens=2) != measured


@pytest.mark.hlo
@pytest.mark.aot
@pytest.mark.parametrize(("t", "m"), [(1, 4096), (1, 5120), (2, 4096)])
def test_a_few_tokens_take_one_kernel(t, m, compile_for):
    def linear(x, rotation, weight, scale, residual):
        return quantized_linear(
            x, rotation, SETTINGS, weight, norm_scale=scale, epsilon=1e-5, residual=residual
        )

    program = compile_for("h100", linear, *operands(t, m, 1024, make=jax.eval_shape)).as_text()
    found = re.findall(r"^ .*? = .*? ([\w-]+)\(", program[program.index("ENTRY") :], re.MULTILINE)
    work = [name for name in found if name not in ("parameter", "constant", "bitcast", "get-tuple-element")]
    assert work == ["custom-call"]
