"""Settings read from config.json, or refused."""

import json

import numpy as np
import pytest

from twla_jax.errors import TwlaError
from twla_jax.models import rope
from twla_jax.models.config import DecoderConfig, RopeScaling, check_vocabulary
from twla_jax.models.families import config_from_hf

BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 5e5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_both_spellings_of_rope_settings_mean_the_same():
    old = {**BASE, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {k: v for k, v in BASE.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(old).rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_silent_keys_take_the_family_defaults():
    without_kv = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
    llama = config_from_hf(without_kv)
    assert (llama.num_kv_heads, llama.head_dim, llama.tie_word_embeddings) == (4, 8, False)
    assert config_from_hf({**BASE, "model_type": "mistral"}).sliding_window == 4096
    qwen2 = config_from_hf({**BASE, "model_type": "qwen2"})
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.sliding_window) == (True, False, None)
    qwen3 = config_from_hf({**BASE, "model_type": "qwen3"})
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)


def test_sliding_layers_come_from_the_list_or_the_count():
    sliding = {**BASE, "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 16}
    assert config_from_hf({**sliding, "max_window_layers": 3}).sliding_layers == (3,)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert config_from_hf({**sliding, "layer_types": kinds}).sliding_layers == (0, 2)


def test_settings_survive_json():
    for scaling in (None, {"rope_type": "llama3", **LLAMA3}):
        config = config_from_hf({**BASE, "rope_scaling": scaling, "eos_token_id": [1, 2]})
        assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    factors = RopeScaling(kind="factors", factors=(1.0, 2.0, 4.0, 8.0))
    config = DecoderConfig.from_dict({**config.to_dict(), "rope_scaling": factors.__dict__})
    assert config.rope_scaling == factors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"model_type": "deepseek_v3"},
            "'deepseek_v3' is not supported; supported are llama, mistral, qwen2, qwen3",
        ),
        ({"model_type": None}, "architecture null"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu' or 'swish'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already (gptq)"),
        ({"num_key_value_heads": 3}, "4 heads of 8 cannot share 3 key/value heads"),
        ({"hidden_size": None}, "hidden_size is null, not an integer"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, named):
    with pytest.raises(TwlaError) as error:
        config_from_hf({**BASE, **change}, source="some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert named in str(error.value)


def test_llama3_scaling_keeps_high_frequencies_and_divides_low_ones():
    config = config_from_hf({**BASE, "head_dim": 16, "rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    plain = rope.inverse_frequencies(config_from_hf({**BASE, "head_dim": 16}))
    ratio = plain / rope.inverse_frequencies(config)
    assert ratio[0] == 1.0
    np.testing.assert_allclose(ratio[2:], 8.0, rtol=1e-6)
    assert 1 < ratio[1] < 8


def test_a_missing_key_is_named():
    with pytest.raises(TwlaError, match="'hidden_size' is missing"):
        config_from_hf({key: value for key, value in BASE.items() if key != "hidden_size"})


def test_token_ids_are_integers_of_the_vocabulary():
    check_vocabulary(np.arange(4, dtype=np.uint8), 4)
    for ids, message in (
        (np.array([1.7]), "type float64, not an integer type"),
        (np.array([1, 4]), "token id 4 is not in the model's vocabulary of 4"),
        (np.array([2**32 + 1]), "token id 4294967297"),
        (np.array([-1]), "token id -1"),
    ):
        with pytest.raises(TwlaError, match=message):
            check_vocabulary(ids, 4)
