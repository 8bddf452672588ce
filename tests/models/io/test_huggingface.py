"""Folders in Hugging Face layout: one shard or many, whole or damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from twla_jax.errors import TwlaError
from twla_jax.models.io.readers import load_model, read_config, read_model

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def case(golden):
    return golden("llama")


def write_shards(case, folder):
    """Splits the weights over two files, as published models of more than a few GB are."""
    (folder / "config.json").write_text(json.dumps(case.config))
    names = sorted(case.weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: case.weights[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def refusal(folder):
    with pytest.raises(TwlaError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shards_give_the_same_model_as_one_file(case, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    write_shards(case, tmp_path / "many")
    one, many = load_model(case.write(tmp_path / "one")), load_model(tmp_path / "many")
    np.testing.assert_array_equal(one.blocks.up.kernel.get_value(), many.blocks.up.kernel.get_value())
    np.testing.assert_array_equal(one.blocks.up.kernel.get_value()[1], case.weights[NAME].T)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_parameters_are_host_arrays_in_their_stored_type(case, tmp_path, dtype):
    case.weights = {name: value.astype(dtype) for name, value in case.weights.items()}
    model = load_model(case.write(tmp_path), dtype=np.float16)
    kernel = model.blocks.q.kernel.get_value()
    assert isinstance(kernel, np.ndarray)
    assert (kernel.dtype, kernel.shape) == (dtype, (2, 32, 32))
    assert model.dtype == np.float16


def test_a_tied_head_that_is_stored_all_the_same_is_not_read(golden, tmp_path):
    case = golden("qwen2_tied")
    case.weights["lm_head.weight"] = case.weights["model.embed_tokens.weight"]
    assert load_model(case.write(tmp_path)).head is None


def test_a_missing_shard_is_named(case, tmp_path):
    write_shards(case, tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert refusal(tmp_path).startswith(
        f"{tmp_path}/model-00002-of-00002.safetensors: this part of the model is missing"
    )


@pytest.mark.parametrize("keep", [0, 5, 300, -10])
def test_a_truncated_shard_is_named(case, tmp_path, keep):
    write_shards(case, tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert refusal(tmp_path).startswith(f"{shard}: cut short")


def test_a_shard_without_what_the_index_promises_is_named(case, tmp_path):
    weight_map = write_shards(case, tmp_path)
    held = {
        name: case.weights[name]
        for name in weight_map
        if weight_map[name] == weight_map[NAME] and name != NAME
    }
    save_file(held, tmp_path / weight_map[NAME])
    assert f"{tmp_path / weight_map[NAME]}: tensor {NAME!r}" in refusal(tmp_path)


def test_unusable_tensors_are_named(case, tmp_path):
    original = case.weights[NAME]
    broken = original.copy()
    broken[3, 4], broken[5, 6] = np.nan, np.inf
    changes = {
        "has 2 NaN or infinite values": broken,
        "has shape [31, 32], not [48, 32]": original[:31],
        "is I32; supported are F32, F16, BF16": original.astype(np.int32),
    }
    for message, value in changes.items():
        case.weights[NAME] = value
        assert refusal(case.write(tmp_path)) == f"{tmp_path}/model.safetensors: tensor {NAME!r} {message}"
    del case.weights[NAME]
    assert f"tensor {NAME!r} is missing (1 of 21 are)" in refusal(case.write(tmp_path))
    case.weights[NAME] = original
    case.weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float16)
    assert "q_proj.bias' has no place in a llama decoder" in refusal(case.write(tmp_path))


def test_the_config_is_checked_before_anything_else(case, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**case.config, "model_type": "gpt_neox"}))
    for read in (load_model, read_model, read_config):
        with pytest.raises(
            TwlaError, match="'gpt_neox' is not supported; supported are llama, mistral, qwen2, qwen3"
        ):
            read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert refusal(tmp_path).startswith(f"{tmp_path}/config.json: not valid JSON")
    (tmp_path / "config.json").unlink()
    assert refusal(tmp_path).startswith(f"{tmp_path}/config.json: cannot be read")
    assert refusal(tmp_path / "nowhere") == f"{tmp_path}/nowhere: no such file or folder"


def test_a_folder_without_weights_or_tokenizer_is_named(case, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)
    with pytest.raises(TwlaError, match="no tokenizer is there"):
        read_model(tmp_path)
