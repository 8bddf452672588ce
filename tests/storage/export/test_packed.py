"""The packed arrays in one safetensors file, read by the example that knows numpy alone."""

import dataclasses
import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.core import tensors
from twla_jax.jobs.export_model import export_model
from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint

from helpers.plain_planes import EXPERTS, exported, plain_model

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "read_packed.py"


@pytest.fixture(scope="module")
def packed_model():
    return runpy.run_path(str(EXAMPLE))["PackedModel"]


def test_the_reader_is_sixty_lines_of_code_and_numpy():
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 60
    assert {line.split()[1] for line in lines if line.startswith("import")} == {"json", "sys", "numpy"}


def test_it_reads_one_plane_and_rotations(quantised_folder, tiny_ternary, folded, packed_model, tmp_path):
    export_model(quantised_folder, tmp_path / "st", format="safetensors")
    model = packed_model(tmp_path / "st" / "model.safetensors")
    assert model.config["hidden_size"] == 42
    for name, site in (("k", "qkv"), ("o", "o"), ("gate", "mlp"), ("down", "down")):
        weight = model.weight(f"blocks.{name}.kernel", 1) @ model.rotation(site, 1)
        np.testing.assert_allclose(weight, folded(tiny_ternary, name, site, 1), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(model.weight("embed"), np.asarray(tiny_ternary.embed.get_value()))


def test_it_reads_two_planes_planes_without_mu_integers_and_bfloat16(tiny_ternary, packed_model, tmp_path):
    rng = np.random.default_rng(5)
    first = tiny_ternary.blocks.o.kernel.get_value()
    codes = jnp.asarray(rng.integers(-1, 2, (2, 3, 42, 42)), jnp.int8)
    alpha = jnp.abs(first.alpha.astype(jnp.float32))
    two = tensors.from_codes(codes[0], alpha, first.mu, 16, codes[1], alpha / 3)
    integers = tensors.IntegerTensor(
        codes=jnp.asarray(rng.integers(0, 8, (97, 42)), jnp.uint8),
        scale=jnp.asarray(rng.random((97, 3)), jnp.float16),
        zero_point=jnp.asarray(rng.integers(0, 8, (97, 3)), jnp.uint8),
        in_features=42,
        group_size=16,
        bits=3,
    )
    norm = jnp.asarray(rng.normal(size=42), jnp.bfloat16)
    tiny_ternary.blocks.o.kernel.set_value(two)
    tiny_ternary.embed.set_value(integers)
    tiny_ternary.norm.scale.set_value(norm)
    without_mu = dataclasses.replace(tiny_ternary.blocks.q.kernel.get_value(), mu=None)
    tiny_ternary.blocks.q.kernel.set_value(without_mu)
    checkpoint.save(tiny_ternary, None, tmp_path / "out", Recipe(), {})
    export_model(tmp_path / "out", tmp_path / "st", format="safetensors")
    model = packed_model(tmp_path / "st" / "model.safetensors")
    np.testing.assert_allclose(model.weight("blocks.o.kernel"), tensors.dequantize(two), rtol=1e-5, atol=1e-6)
    alone = tensors.dequantize(without_mu)
    np.testing.assert_allclose(model.weight("blocks.q.kernel"), alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.weight("embed"), integers.dequantize())
    np.testing.assert_array_equal(model.weight("norm.scale"), np.asarray(norm, np.float64))


def test_it_reads_every_expert(packed_model, tmp_path):
    planes = plain_model(64, offset=0.1, config=EXPERTS)
    model = packed_model(exported(planes, tmp_path, format="safetensors") / "model.safetensors")
    for name in ("gate", "down"):
        kernel = getattr(planes.blocks, name).kernel.get_value()
        expected = tensors.dequantize(kernel)[1]
        np.testing.assert_allclose(model.weight(f"blocks.{name}.kernel", 1), expected, rtol=1e-5, atol=1e-6)
