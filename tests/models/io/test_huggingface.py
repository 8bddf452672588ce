"""Folders in Hugging Face layout: one shard or many, whole or damaged."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from twla_jax.errors import TwlaError
from twla_jax.jobs.loading import kept_files
from twla_jax.models.io import huggingface
from twla_jax.models.io.readers import load_model, read_config, read_model
from twla_jax.models.stored_layers import StoredLayers, in_files, in_turn

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


def test_layers_in_files_are_those_of_the_model_in_memory(case, tmp_path):
    case.weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in case.weights.items()}
    write_shards(case, tmp_path)
    held, stored = load_model(tmp_path), huggingface.load_model(tmp_path, in_files=True)
    assert in_files(stored)
    for left, right in zip(jax.tree.leaves(held), jax.tree.leaves(stored), strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        np.testing.assert_array_equal(left, np.asarray(right))
        np.testing.assert_array_equal(left[1:], right[1:])
    kernel = stored.blocks.up.kernel.get_value()
    assert isinstance(kernel, StoredLayers)
    np.testing.assert_array_equal(kernel[1], case.weights[NAME].T)
    ahead = list(in_turn(stored.blocks, 0, 2))
    np.testing.assert_array_equal(ahead[1].up.kernel.get_value(), kernel[-1])


def test_experts_in_files_are_those_of_the_model_in_memory(golden, tmp_path):
    case = golden("qwen3_moe")
    write_shards(case, tmp_path)
    held, stored = load_model(tmp_path), huggingface.load_model(tmp_path, in_files=True)
    for left, right in zip(jax.tree.leaves(held), jax.tree.leaves(stored), strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)
        np.testing.assert_array_equal(left, np.asarray(right))
    expert = case.weights["model.layers.1.mlp.experts.5.down_proj.weight"]
    np.testing.assert_array_equal(stored.blocks.down.kernel.get_value()[1][5], expert.T)


def test_the_only_expert_of_a_layer_in_a_file_keeps_its_axis(golden, tmp_path):
    case = golden("qwen3_moe")
    case.config |= {"num_experts": 1, "num_local_experts": 1, "num_experts_per_tok": 1}
    case.weights = {
        name: value[:1] if name.endswith("mlp.gate.weight") else value
        for name, value in case.weights.items()
        if ".experts." not in name or ".experts.0." in name
    }
    stored = huggingface.load_model(case.write(tmp_path), in_files=True).blocks.down.kernel.get_value()
    expert = case.weights["model.layers.1.mlp.experts.0.down_proj.weight"]
    np.testing.assert_array_equal(stored[1], expert.T[None])


def test_a_layer_in_a_file_is_checked_when_it_is_read(case, tmp_path):
    case.weights[NAME][3, 5] = np.nan
    stored = huggingface.load_model(case.write(tmp_path), in_files=True).blocks.up.kernel.get_value()
    assert np.isfinite(stored[0]).all()
    with pytest.raises(TwlaError, match=rf"{NAME}' has 1 NaN or infinite"):
        stored[1]


@pytest.mark.parametrize("bits", [0x7F81, 0xFFC0])
def test_nan_of_any_form_is_one_line(case, tmp_path, bits):
    """A signalling one makes numpy warn, beside bf16 that becomes float32."""
    case.weights["model.embed_tokens.weight"] = case.weights["model.embed_tokens.weight"].astype(np.float32)
    kernel = case.weights[NAME].astype(ml_dtypes.bfloat16)
    kernel.view(np.uint16)[0, 0] = bits
    case.weights[NAME] = kernel
    with pytest.raises(TwlaError, match="has 1 NaN or infinite"):
        load_model(case.write(tmp_path))


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
        "is I32; supported are F32, F16, BF16, F64": original.astype(np.int32),
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


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_kept(golden, tmp_path, caplog):
    case = golden("llama")
    case.config["tie_word_embeddings"] = True
    model = load_model(case.write(tmp_path))
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.head.kernel.get_value(), case.weights["lm_head.weight"].T)
    assert "the head differs; it is kept apart" in caplog.text
    assert read_config(tmp_path).tie_word_embeddings  # what the file says; the model knows better


def test_of_a_tied_pair_the_head_alone_is_enough(golden, tmp_path):
    case = golden("qwen2_tied")
    embed = case.weights["lm_head.weight"] = case.weights.pop("model.embed_tokens.weight")
    model = load_model(case.write(tmp_path))
    assert model.head is None
    np.testing.assert_array_equal(model.embed.get_value(), embed)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: (
            name if name.startswith("lm_head") else f"model.language_model.{name.removeprefix('model.')}"
        ),
        lambda name: f"language_model.{name}",
    ],
)
def test_names_may_lack_the_usual_prefix_or_have_more(case, tmp_path, rename):
    case.weights = {rename(name): value for name, value in case.weights.items()}
    model = load_model(case.write(tmp_path))
    np.testing.assert_array_equal(model.blocks.up.kernel.get_value()[1], case.weights[rename(NAME)].T)


def test_tensors_beside_the_text_decoder_are_named_and_left_out(case, tmp_path, caplog):
    extra = np.zeros(2, np.float32)
    names = (
        "vision_tower.a",
        "vision_tower.b",
        "mtp.fc.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    case.weights |= dict.fromkeys(names, extra)
    load_model(case.write(tmp_path))
    assert "2 tensors of vision are left out (vision_tower.a, …)" in caplog.text
    assert "1 tensors of multi-token prediction are left out" in caplog.text


def test_a_tensor_that_the_index_does_not_list_is_not_passed_over(case, tmp_path):
    weight_map = write_shards(case, tmp_path)
    held = {name: case.weights[name] for name in weight_map if weight_map[name] == weight_map[NAME]}
    save_file({**held, "model.extra.weight": np.zeros(2, np.float32)}, tmp_path / weight_map[NAME])
    assert "'model.extra.weight' has no place in a llama decoder" in refusal(tmp_path)


def test_stale_weights_beside_an_index_are_refused(case, tmp_path):
    write_shards(case, tmp_path)
    save_file(case.weights, tmp_path / "model.safetensors")
    assert refusal(tmp_path).endswith("which does not name it; keep one of them")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1, "weight_map is an object of 1, not an object of which each value is a text"),
        (["a"], "weight_map is an object of 1"),
        ("../escape.safetensors", "'../escape.safetensors' is not the name of a file in this folder"),
        ("/abs.safetensors", "is not the name of a file in this folder"),
        ("", "'' is not the name of a file in this folder"),
    ],
)
def test_an_index_names_files_of_its_own_folder(case, tmp_path, value, message):
    write_shards(case, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: value}}))
    assert message in refusal(tmp_path)


def test_shapes_are_compared_before_anything_is_allocated(case, tmp_path):
    case.config |= {"vocab_size": 2**26, "hidden_size": 2**22}
    assert "has shape [32, 48], not [4194304, 48]" in refusal(case.write(tmp_path))


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    ],
)
def test_quantised_tensors_are_named_even_where_the_config_is_silent(case, tmp_path, name, tool):
    case.weights[name] = np.zeros(2, np.uint8)
    assert f"its weights are quantised already ({tool}, tensor {name!r})" in refusal(case.write(tmp_path))


def test_files_that_are_no_weights_are_named_at_once(case, tmp_path):
    case.write(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert (
        refusal(tmp_path) == f"{weights}: is a git-lfs pointer, not the file itself; run `git lfs pull` there"
    )
    weights.unlink()
    os.mkfifo(weights)
    assert refusal(tmp_path) == f"{weights}: not a regular file"
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    assert "pickled weights are not read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not valid JSON (nested too deeply)"),
        ('{"a":' * 100_000, "not valid JSON (nested too deeply)"),
        ("[]", "not a JSON object"),
        ('{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ('{"eos_token_id": 1' + "0" * 5000 + "}", "not valid JSON"),
    ],
)
def test_generation_settings_are_checked(case, tmp_path, content, message):
    (case.write(tmp_path) / "generation_config.json").write_text(content)
    assert message in refusal(tmp_path)


def test_generation_ends_at_the_tokens_of_either_file(case, tmp_path):
    case.config["eos_token_id"] = 2
    for stated, ends in (({"eos_token_id": [2, 13]}, (2, 13)), ({"eos_token_id": 5}, (2, 5)), ({}, (2,))):
        (case.write(tmp_path) / "generation_config.json").write_text(json.dumps(stated))
        assert read_config(tmp_path).eos_token_ids == ends
    # A quantised folder keeps the file as it is.
    assert json.loads(kept_files(tmp_path)["generation_config.json"]) == stated
