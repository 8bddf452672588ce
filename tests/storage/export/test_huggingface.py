"""The dequantised Hugging Face folder: rotations folded back, read by transformers and by this library's reader."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from twla_jax.errors import TwlaError
from twla_jax.jobs import export_model as job
from twla_jax.models.config import DecoderConfig, RopeScaling
from twla_jax.models.families import config_from_hf
from twla_jax.models.io import readers
from twla_jax.models.sites import set_activation_bits
from twla_jax.storage import checkpoint
from twla_jax.storage.export import safetensors_file
from twla_jax.storage.export.hf_config import hf_config

LINEARS = {"q": "qkv", "o": "o", "up": "mlp", "down": "down"}
PUBLISHED = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


def test_weights_are_those_of_the_original_basis(quantised_folder, tiny_ternary, folded, tmp_path):
    job.export_model(quantised_folder, tmp_path / "hf", format="hf", dtype="float32")
    held = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    for name, site in LINEARS.items():
        for layer in range(3):
            expected = folded(tiny_ternary, name, site, layer)
            written = held[f"model.layers.{layer}.{PUBLISHED[name]}.weight"]
            np.testing.assert_allclose(written, expected, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(
        held["model.embed_tokens.weight"], np.asarray(tiny_ternary.embed.get_value(), np.float32)
    )


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_it_scores_as_the_quantised_model_with_16_bit_activations(
    quantised_folder, tiny_ternary, tmp_path, dtype, error
):
    figures = job.export_model(quantised_folder, tmp_path / "hf", format="hf", dtype=dtype)
    model, _ = readers.read_model(tmp_path / "hf")
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 97, (2, 12)))
    expected = set_activation_bits(tiny_ternary, 16)(tokens)
    np.testing.assert_allclose(model(tokens), expected, atol=error * float(jnp.abs(expected).max()))
    assert figures["activation_bits"] < 16
    assert figures["bytes"] == sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())


def test_settings_tokenizer_and_template_go_along(quantised_folder, tiny_config, word_tokenizer, tmp_path):
    job.export_model(quantised_folder, tmp_path / "hf", format="hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.num_hidden_layers, config.head_dim, config.tie_word_embeddings) == (3, 14, True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert readers.read_config(tmp_path / "hf") == tiny_config.__class__.from_dict(
        {**tiny_config.to_dict(), "eos_token_ids": (1,)}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("w3 w5")["input_ids"] == word_tokenizer("w3 w5")["input_ids"]
    assert tokenizer.chat_template == word_tokenizer.chat_template
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["temperature"] == 0.6


SCALINGS = {
    "none": None,
    "linear": RopeScaling(kind="linear", factor=4.0),
    "llama3": RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.2),
    "longrope": RopeScaling(
        kind="longrope",
        factor=2.0,
        factors=(1.0,) * 7,
        long_factors=(3.0,) * 7,
        original_max_position_embeddings=64,
        attention_factor=1.1,
    ),
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_settings_are_read_back_as_they_were(family, scaling, tiny_config):
    settings = {**tiny_config.to_dict(), "model_type": family, "rope_scaling": None, "bos_token_id": 0}
    settings |= {
        "llama": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        "mistral": {"sliding_window": 9, "sliding_layers": (0, 1, 2)},
        "qwen2": {"qkv_bias": True, "sliding_window": 9, "sliding_layers": (1, 2)},
        "qwen3": {"qk_norm": True, "eos_token_ids": (1, 5)},
    }[family]
    config = DecoderConfig(**(settings | {"rope_scaling": SCALINGS[scaling]}))
    assert config_from_hf(hf_config(config, "float16")) == config


def test_ggufs_list_of_factors_gives_the_same_angles_at_every_length(tiny_config):
    factors = tuple(float(i + 1) for i in range(7))
    settings = tiny_config.to_dict() | {"rope_scaling": RopeScaling(kind="factors", factors=factors)}
    scaling = config_from_hf(hf_config(DecoderConfig(**settings), "float16")).rope_scaling
    assert (scaling.factors, scaling.long_factors, scaling.attention_factor) == (factors, factors, 1.0)


def test_what_transformers_has_no_class_for_is_refused(tiny_config):
    settings = tiny_config.to_dict()
    with pytest.raises(TwlaError, match="no llama with the biases"):
        hf_config(DecoderConfig(**settings | {"qkv_bias": True}), "float16")
    with pytest.raises(TwlaError, match="type gemma9 cannot be written"):
        hf_config(DecoderConfig(**settings | {"model_type": "gemma9"}), "float16")


def test_large_models_are_cut_into_shards(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.normal(size=(3, i + 1)).astype(np.float32) for i in range(5)}
    tensors = [
        safetensors_file.Tensor(name, array.dtype, array.shape, lambda array=array: array)
        for name, array in arrays.items()
    ]
    names = safetensors_file.write_model(tmp_path, tensors, shard_bytes=80)
    index = json.loads((tmp_path / safetensors_file.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert len(names) == 3
    for name, array in arrays.items():
        held = safetensors.numpy.load_file(tmp_path / index["weight_map"][name])
        np.testing.assert_array_equal(held[name], array)


def test_nothing_is_left_of_an_export_that_fails(quantised_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "write_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.export_model(quantised_folder, tmp_path / "hf", format="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_taken_places_and_stray_options_are_refused(quantised_folder, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    with pytest.raises(TwlaError, match="exists and is not empty"):
        job.export_model(quantised_folder, tmp_path / "hf", format="hf")
    with pytest.raises(TwlaError, match="--dtype is for --format hf"):
        job.export_model(quantised_folder, tmp_path / "st", format="safetensors", dtype="float16")
    with pytest.raises(TwlaError, match="not a quantised model"):
        job.export_model(tmp_path / "hf", tmp_path / "st", format="safetensors")


def test_values_beyond_float16_are_refused_with_the_type_that_holds_them(
    quantised_folder, tiny_ternary, tmp_path
):
    tiny_ternary.norm.scale.set_value(jnp.full(42, 1e5, jnp.float32))
    checkpoint.save(tiny_ternary, None, tmp_path / "large", checkpoint.load(quantised_folder)[2].recipe, {})
    with pytest.raises(TwlaError, match=r"model\.norm\.weight .* give --dtype float32"):
        job.export_model(tmp_path / "large", tmp_path / "hf", format="hf", dtype="float16")
    assert not (tmp_path / "hf").exists()
