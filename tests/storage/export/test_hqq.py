"""The form in which the hqq package saves linears: offsets μ become zero points, to the rounding of float32."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from twla_jax.core import tensors
from twla_jax.errors import TwlaError
from twla_jax.jobs.export_model import export_model
from twla_jax.storage.export import hqq

from helpers.plain_planes import exported, plain_model

GOLDEN = Path(__file__).parents[2] / "goldens" / "exports" / "hqq.npz"


def test_groups_are_as_the_package_packs_and_reads_them():
    golden = np.load(GOLDEN)
    held = hqq.pack(golden["codes"], golden["alpha"], golden["mu"])
    np.testing.assert_array_equal(held.codes, golden["state.W_q"])
    np.testing.assert_array_equal(held.scale, golden["state.scale"])
    np.testing.assert_array_equal(held.zero, golden["state.zero"])
    alpha, mu = (np.repeat(golden[name].astype(np.float64), 32, 1) for name in ("alpha", "mu"))
    np.testing.assert_allclose(golden["dense"], alpha * golden["codes"] + mu, rtol=0, atol=1e-7)


def test_a_linear_has_all_that_the_package_saves_of_one(tmp_path):
    golden = np.load(GOLDEN)
    model = plain_model(128, offset=0.02)
    folder = exported(model, tmp_path, format="hqq")
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    stem = "model.layers.1.mlp.down_proj."
    linear = {name.removeprefix(stem): value for name, value in held.items() if name.startswith(stem)}
    saved = {name.removeprefix("state."): golden[name] for name in golden.files if name.startswith("state.")}
    assert {name: (value.dtype, value.ndim) for name, value in linear.items()} == {
        name: (value.dtype, value.ndim) for name, value in saved.items()
    }
    own = {"W_q", "scale", "zero", "group_size", "shape"}
    for name in saved.keys() - own:
        np.testing.assert_array_equal(linear[name], saved[name])
    (n, m), group = linear["shape"], int(linear["group_size"])
    assert ((n, m), group) == ((256, 320), 64)
    fields = np.concatenate([linear["W_q"] >> shift & 3 for shift in (6, 4, 2, 0)]).astype(np.float64)
    dense = ((fields - linear["zero"]) * linear["scale"]).reshape(n, m)
    expected = np.asarray(tensors.dequantize(model.blocks.down.kernel.get_value()))[1]
    np.testing.assert_allclose(dense, expected, rtol=0, atol=1e-7)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = settings["quant_config"]["weight_quant_params"]
    assert (settings["quant_method"], weights["nbits"], weights["group_size"], weights["axis"]) == (
        "hqq",
        2,
        64,
        1,
    )


def test_what_it_cannot_hold_is_refused_with_the_recipe_that_would_do(quantised_folder, tmp_path):
    with pytest.raises(TwlaError, match=r"rotates no inputs.* w1\.58-sym, or with rotation = false"):
        export_model(quantised_folder, tmp_path / "dest", format="hqq")
    with pytest.raises(TwlaError, match="hqq needs groups of 32 columns or a multiple"):
        exported(plain_model(16), tmp_path / "small", format="hqq")
    model = plain_model(128)
    up = model.blocks.up.kernel.get_value()
    planes = {"residual_codes": up.codes, "residual_ratio": jnp.ones(up.alpha.shape, jnp.uint8)}
    model.blocks.up.kernel = nnx.Param(dataclasses.replace(up, **planes))
    with pytest.raises(TwlaError, match=r"one ternary plane, blocks\.up\.kernel has two"):
        exported(model, tmp_path / "two", format="hqq")
    assert not list(tmp_path.rglob("dest"))
