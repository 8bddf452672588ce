"""Hugging Face folders of every family: transformers reads the settings, and weights have their published names."""

import re

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers

from twla_jax.errors import TwlaError
from twla_jax.models.families import FAMILIES, config_from_hf
from twla_jax.models.io import readers
from twla_jax.models.io.huggingface import load_model
from twla_jax.storage.export import gguf_file, hf_families, huggingface
from twla_jax.storage.export.hf_config import hf_config

from helpers.golden import NAMES, Golden

forward = jax.jit(lambda model, tokens: model(tokens))
WRITTEN = [name for name in NAMES if Golden(name).config["model_type"] in hf_families.FAMILIES]
# What decides the forward pass, and is not of one family alone.
KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *(
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "head_dim",
        "layer_types",
    ),
    *(
        "rope_parameters",
        "sliding_window",
        "attention_bias",
        "mlp_bias",
        "no_rope_layers",
        "hidden_activation",
    ),
    *("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier", "hidden_act"),
    *("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("swiglu_alpha", "swiglu_limit"),
    *("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "use_sliding_window"),
)


def test_every_family_can_be_written():
    assert hf_families.FAMILIES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_reads_the_settings_that_the_model_came_with(name):
    original = Golden(name).config
    written = hf_config(config_from_hf(original), "float32")
    expected = transformers.AutoConfig.for_model(**original).to_dict()
    found = transformers.AutoConfig.for_model(**written).to_dict()
    for key in KEYS:
        value = expected.get(key)
        if key == "intermediate_size" and "moe_intermediate_size" in expected:
            continue  # of an MLP without experts, which no layer has
        if key == "rope_parameters":
            _assert_rope(found[key], value)
        elif isinstance(value, int | float):
            assert found[key] == pytest.approx(value, rel=1e-12), key
        elif key in expected and key != "head_dim":  # which some classes leave open
            assert found.get(key) == value, key


def _assert_rope(found, expected):
    """Equal where both say something; what the original leaves open may be said."""
    for key, value in expected.items():
        if isinstance(value, dict):
            _assert_rope(found[key], value)
        elif isinstance(value, int | float):
            assert found[key] == pytest.approx(value, rel=1e-12), key
        elif value is not None:
            assert found[key] == value, key


@pytest.mark.parametrize("name", WRITTEN)
def test_settings_are_read_back_as_they_were(name):
    config = config_from_hf(Golden(name).config)
    again = config_from_hf(hf_config(config, "float32"))
    held, found = config.to_dict(), again.to_dict()
    for key, value in held.items():
        expected = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
        assert found[key] == expected, key


@pytest.mark.parametrize(
    "name",
    [
        *("smollm3", "granite", "gemma2", "gemma3", "olmo3", "phi3", "phi4_mini"),
        *("mixtral", "qwen3_moe", "gpt_oss"),
    ],
)
def test_weights_have_the_names_and_values_that_they_came_with(name, tmp_path):
    case = Golden(name)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    model = load_model(case.write(tmp_path / "in"))
    huggingface.write(model, None, tmp_path / "out", dtype="float32", files={})
    held = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert held.keys() == case.weights.keys()
    for key, weight in case.weights.items():
        np.testing.assert_allclose(held[key], weight, atol=1e-7, rtol=0, err_msg=key)


# What llama.cpp takes for granted of an architecture, where the small model has something else.
AS_LLAMA_CPP_HAS_IT = {
    "smollm3": {"no_rope_layers": [1, 1]},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 2},
}
WITHOUT_A_FORM = {
    "llama_longrope": "rope scaling 'longrope'",
    "llama_longrope_short": "rope scaling 'longrope'",
    "qwen2_sliding": "windows in only some layers",
    "gemma3_linear": "for sliding_layers of gemma3_text",
    "olmo3_yarn": "the rotary scaling of olmo3",
    "qwen3_moe_plain": "takes True for normalize_routing of qwen3_moe, not False",
    "gpt_oss": "type gpt_oss are not written as GGUF",
}


@pytest.mark.parametrize("name", sorted({*WRITTEN} - {*WITHOUT_A_FORM}))
def test_a_gguf_file_holds_the_same_model(name, tmp_path):
    case = Golden(name)
    case.config |= AS_LLAMA_CPP_HAS_IT.get(name, {})
    model = load_model(case.write(tmp_path))
    gguf_file.write(model, None, tmp_path / "model.gguf")
    again = readers.load_model(tmp_path / "model.gguf")
    expected = np.asarray(forward(model, case.tokens))
    np.testing.assert_allclose(
        forward(again, case.tokens), expected, atol=1e-5 * np.abs(expected).max(), rtol=0
    )


@pytest.mark.parametrize("name", ["smollm3", "gemma2", *WITHOUT_A_FORM])
def test_what_llama_cpp_would_take_for_something_else_is_refused(name, tmp_path):
    message = {
        "smollm3": "for no_rope_layers of smollm3",
        "gemma2": "for query_scale of gemma2",
    } | WITHOUT_A_FORM
    with pytest.raises(TwlaError, match=message[name]):
        gguf_file.write(load_model(Golden(name).write(tmp_path)), None, tmp_path / "model.gguf")


@pytest.mark.parametrize(("name", "architecture"), [("mixtral", "LLAMA"), ("qwen3_moe", "QWEN3MOE")])
def test_experts_in_gguf_are_stacked_under_llama_cpps_own_names(name, architecture, tmp_path):
    case = Golden(name)
    gguf_file.write(load_model(case.write(tmp_path)), None, tmp_path / "model.gguf")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 2)
    seen = set()
    for stored, weight in case.weights.items():
        name = table.get_name(re.sub(r"experts\.\d+", "experts", stored), (".weight",))
        seen.add(name)
        if "attn_q.w" in name or "attn_k.w" in name:
            continue  # whose rows have another order
        expert = re.search(r"experts\.(\d+)", stored)
        data = held[name].data if expert is None else held[name].data[int(expert[1])]
        np.testing.assert_array_equal(data, weight)
        matrix = weight.ndim == 2 and "ffn_gate_inp" not in name
        assert held[name].tensor_type.name == ("F16" if matrix else "F32")
    assert seen == held.keys()


@pytest.mark.parametrize("name", ["mistral_sliding", "mixtral"])
def test_a_window_that_llama_cpp_passes_over_is_named(name, tmp_path, caplog):
    gguf_file.write(load_model(Golden(name).write(tmp_path)), None, tmp_path / "model.gguf")
    model_type = Golden(name).config["model_type"]
    assert f"passes over the window of {model_type} models: with more than 7 tokens" in caplog.text


def test_settings_that_a_class_cannot_have_are_refused():
    config = config_from_hf(Golden("phi3").config)
    for family, change, message in (
        ("phi3", {"head_dim": 4}, "no phi3 with heads of this size"),
        ("phi3", {"qkv_bias": True}, "no phi3 with the biases"),
        ("gemma2", {"embed_scale": 1.0}, "no gemma2 with this scale of embeddings"),
        ("olmo2", {"o_bias": True}, "no olmo2 with the biases"),
        ("mistral", {"sliding_window": 7, "sliding_layers": (0,)}, "no mistral with windows in only some"),
        (
            "mixtral",
            {"normalize_routing": False},
            "no mixtral with weights of experts that do not add up to 1",
        ),
        ("gpt_oss", {"qkv_bias": True}, "no gpt_oss with the biases"),
    ):
        settings = config.to_dict() | {"model_type": family, "rope_scaling": None} | change
        with pytest.raises(TwlaError, match=message):
            hf_config(config.from_dict(settings), "float32")
