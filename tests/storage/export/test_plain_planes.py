"""Formats of one scale a group: exact for planes with μ = 0 of inputs that are not rotated, else refused."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from twla_jax.core import tensors
from twla_jax.errors import TwlaError
from twla_jax.jobs.export_model import export_model
from twla_jax.models.io import readers
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.recipe import Recipe, load_recipe
from twla_jax.storage import checkpoint
from twla_jax.storage.export.compressed_tensors import pack_int32

from helpers.plain_planes import exported, plain_model

LINEARS = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}


@pytest.mark.parametrize(("group_size", "common"), [(128, 64), (320, 64)])
def test_compressed_tensors_holds_every_weight_exactly(group_size, common, tmp_path):
    model = plain_model(group_size)
    folder = exported(model, tmp_path, format="compressed-tensors")
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, published in LINEARS.items():
        expected = np.asarray(tensors.dequantize(getattr(model.blocks, name).kernel.get_value()))
        for layer in range(2):
            stem = f"model.layers.{layer}.{published}"
            words, scale = held[f"{stem}.weight_packed"], held[f"{stem}.weight_scale"]
            n, m = held[f"{stem}.weight_shape"]
            integers = [
                [(int(word) >> 2 * (k % 16) & 3) - 2 for k, word in enumerate(np.repeat(row, 16))]
                for row in words
            ]
            dense = np.array(integers)[:, :m] * np.repeat(scale.astype(np.float64), m // scale.shape[1], 1)
            assert dense.shape == (n, m)
            np.testing.assert_array_equal(dense, expected[layer])
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (scheme["quant_method"], scheme["format"]) == ("compressed-tensors", "pack-quantized")
    weights = scheme["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (2, "group", common)


def test_one_scale_a_row_is_a_channel(tmp_path):
    model = plain_model(256, intermediate=256)
    folder = exported(model, tmp_path, format="compressed-tensors")
    scheme = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = scheme["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    assert held["model.layers.0.mlp.up_proj.weight_scale"].shape == (256, 1)


def test_words_hold_sixteen_codes_and_zeros_beyond_the_last():
    words = pack_int32(np.array([[1, 0, -1, *[-2] * 14]], np.int8)).view(np.uint32)
    np.testing.assert_array_equal(words, [[3 | 2 << 2 | 1 << 4, 0]])


@pytest.mark.parametrize(("kind", "group_size"), [("q2_0", 128), ("tq2_0", 256)])
def test_ggufs_ternary_types_hold_every_weight_exactly(kind, group_size, tmp_path):
    model = plain_model(group_size, intermediate=512)
    path = exported(model, tmp_path, format="gguf", gguf_type=kind)
    file = GgufFile(path)
    assert {
        tensor.kind.name for name, tensor in file.tensors.items() if "ffn_" in name and "norm" not in name
    } == {kind.upper()}
    read = readers.load_model(path)
    for name in ("q", "k", "o", "up", "down"):
        expected = np.asarray(tensors.dequantize(getattr(model.blocks, name).kernel.get_value()))
        np.testing.assert_array_equal(getattr(read.blocks, name).kernel.get_value().swapaxes(1, 2), expected)
    size = sum(tensor.size for tensor in file.tensors.values() if tensor.kind.name == kind.upper())
    weights = sum(
        np.prod(tensor.shape) for tensor in file.tensors.values() if tensor.kind.name == kind.upper()
    )
    assert 8 * size / weights == {"q2_0": 2.25, "tq2_0": 2.0625}[kind]


def test_the_gguf_package_reads_tq2_0_alike(tmp_path):
    model = plain_model(256, intermediate=256)
    path = exported(model, tmp_path, format="gguf", gguf_type="tq2_0")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.1.ffn_up.weight"]
    expected = np.asarray(tensors.dequantize(model.blocks.up.kernel.get_value()))[1]
    np.testing.assert_array_equal(gguf.dequantize(held.data, held.tensor_type), expected)


@pytest.mark.parametrize(
    "options", [{"format": "compressed-tensors"}, {"format": "gguf", "gguf_type": "q2_0"}]
)
def test_what_they_cannot_hold_is_refused_with_the_recipe_that_would_do(options, quantised_folder, tmp_path):
    with pytest.raises(TwlaError, match=r"rotates no inputs.* quantise with --recipe w1\.58-sym$"):
        export_model(quantised_folder, tmp_path / "dest", **options)
    model = plain_model(128)
    up = model.blocks.up.kernel.get_value()
    offset = tensors.from_codes(
        jnp.zeros((2, 320, 256), jnp.int8), up.alpha, jnp.full(up.alpha.shape, 0.5, jnp.float16), 128
    )
    model.blocks.up.kernel = nnx.Param(offset)
    with pytest.raises(TwlaError, match=r"has no offset μ, blocks\.up\.kernel has one"):
        exported(model, tmp_path, **options)
    assert not (tmp_path / "dest").exists()
    recipe = load_recipe("w1.58-sym")
    assert recipe.rotation is None


def test_groups_that_are_no_whole_blocks_are_refused_with_those_that_are(tmp_path):
    checkpoint.save(plain_model(128), None, tmp_path / "out", Recipe(), {})
    with pytest.raises(
        TwlaError, match="rows of a multiple of 256 weights, a matrix has 320; give --type f16"
    ):
        export_model(tmp_path / "out", tmp_path / "dest", format="gguf", gguf_type="tq2_0")
    checkpoint.save(plain_model(128, 512), None, tmp_path / "wide", Recipe(), {})
    with pytest.raises(TwlaError, match=r"one for 128; quantise with .* weights\.group_size = 256"):
        export_model(tmp_path / "wide", tmp_path / "dest", format="gguf", gguf_type="tq2_0")
    checkpoint.save(plain_model(16), None, tmp_path / "small", Recipe(), {})
    with pytest.raises(TwlaError, match="groups of 32 columns or a multiple"):
        export_model(tmp_path / "small", tmp_path / "dest", format="compressed-tensors")
