"""Every key that transformers' configuration classes have is read, refused, or known to change nothing."""

import dataclasses
import json

import pytest

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.config_keys import READ, REFUSED, WITHOUT_EFFECT
from twla_jax.models.families import FAMILIES, config_from_hf
from twla_jax.models.rope_settings import RopeScaling

BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def refusal(change):
    with pytest.raises(TwlaError) as error:
        config_from_hf({**BASE, **change}, source="c.json")
    message = str(error.value)
    assert message.startswith("c.json: ")
    assert "\n" not in message
    assert len(message) < 300
    return message.removeprefix("c.json: ")


CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "smollm3": "SmolLM3Config",
    "granite": "GraniteConfig",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "olmo2": "Olmo2Config",
    "olmo3": "Olmo3Config",
    "phi3": "Phi3Config",
    "mixtral": "MixtralConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "gpt_oss": "GptOssConfig",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_of_a_family_is_passed_over_unseen(family):
    import transformers

    keys = {field.name for field in dataclasses.fields(getattr(transformers, CLASSES[family]))}
    assert {"vocab_size", "rope_parameters", "attention_dropout"} <= keys
    assert keys <= {*READ, *REFUSED, *WITHOUT_EFFECT, *FAMILIES[family].keys}
    assert len({*READ, *REFUSED, *WITHOUT_EFFECT}) == len(READ) + len(REFUSED) + len(WITHOUT_EFFECT)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_file_is_silent_the_class_of_the_family_decides(family):
    import transformers

    sizes = {
        key: value
        for key, value in BASE.items()
        if key not in ("max_position_embeddings", "num_key_value_heads")
    }
    sizes |= {"model_type": family, "num_attention_heads": 32, "hidden_size": 1024}
    config = config_from_hf(sizes)
    theirs = getattr(transformers, CLASSES[family])(**{k: v for k, v in sizes.items() if k != "model_type"})
    ends = theirs.eos_token_id
    assert config.eos_token_ids == (
        () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    )
    for ours, name in (
        ("bos_token_id", "bos_token_id"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("num_kv_heads", "num_key_value_heads"),
        ("rms_norm_eps", "rms_norm_eps"),
        ("tie_word_embeddings", "tie_word_embeddings"),
    ):
        assert getattr(config, ours) == getattr(theirs, name), name
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 1024 // 32)
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * 4
    window = getattr(theirs, "sliding_window", None)
    if family == "mistral":  # a window in every layer
        kinds = ["sliding_attention"] * 4
    sliding = (
        () if window is None else tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    )
    assert (config.sliding_layers if config.sliding_window is not None else ()) == sliding
    rotary = theirs.rope_parameters
    full = rotary.get("full_attention", rotary)
    assert config.rope_theta == full["rope_theta"]
    if family == "gpt_oss":  # which has YaRN unless a file says something else
        stated = {key: getattr(config.rope_scaling, key) for key in full.keys() - {"rope_type", "rope_theta"}}
        assert {"rope_type": config.rope_scaling.kind, **stated} == {
            key: value for key, value in full.items() if key != "rope_theta"
        }
        assert (theirs.swiglu_alpha, theirs.swiglu_limit) == (config.swiglu_alpha, config.swiglu_limit)
    else:
        assert config.rope_scaling is None
        assert full["rope_type"] == "default"


def test_what_transformers_passes_over_in_a_family_is_refused_or_changes_nothing():
    for family in ("gemma3_text", "olmo3"):
        change = {
            "model_type": family,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "sliding_window": 8,
        }
        flat = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        assert "by kind of layer" in refusal({**change, "rope_parameters": flat})
        assert refusal(change) == "the rope scaling has a 'type' 'linear'; call it 'rope_type'"
    assert "sliding_window_pattern is 6" in refusal({"model_type": "gemma2", "sliding_window_pattern": 6})
    olmo = {**BASE, "model_type": "olmo3"}
    assert config_from_hf({**olmo, "rope_local_base_freq": 7.0}) == config_from_hf(olmo)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_that_a_family_takes_from_a_file_is_checked(family):
    """A default under a key of its own would be replaced by whatever a file says under that key."""
    assert FAMILIES[family].defaults.keys() <= READ.keys() | FAMILIES[family].keys.keys()


def test_settings_of_gemmas_text_may_stand_outside():
    text = {key: value for key, value in BASE.items() if key != "model_type"}
    outside = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {**text, "head_dim": 16}}
    assert config_from_hf(outside).eos_token_ids == (1, 106)
    with pytest.raises(TwlaError, match="quantised already"):
        config_from_hf({**outside, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(TwlaError, match="head_dim is null"):
        config_from_hf({**outside, "text_config": {**text, "head_dim": None}})


def test_newer_and_older_files_of_layered_rotary_positions_mean_the_same():
    gemma = {**BASE, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8}
    new = {
        "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    old = {
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    config = config_from_hf({**gemma, "rope_parameters": new})
    assert config == config_from_hf({**gemma, **old})
    assert (config.rope_theta, config.sliding_rope_theta) == (5e5, 2e4)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert config.sliding_layers == (0, 1, 2, 3)
    silent = config_from_hf(gemma)
    assert (silent.rope_theta, silent.sliding_rope_theta, silent.rope_scaling) == (1e6, 1e4, None)
    several = {"model_type": "gemma3", "text_config": gemma, "vision_config": {}}
    assert config_from_hf(several) == silent
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    olmo = config_from_hf({**BASE, "model_type": "olmo3", "rope_scaling": yarn})
    assert olmo.rope_scaling.kind == "yarn"
    assert (olmo.rope_theta, olmo.sliding_rope_theta, olmo.sliding_layers) == (5e5, 5e5, (0, 1, 2))
    scaled = {**new, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    for family in ("gemma3_text", "olmo3"):
        assert "a rope scaling of sliding layers" in refusal(
            {"model_type": family, "rope_parameters": scaled}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [2] * 4}, "no_rope_layers is a list of 4, not a list"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0, not a number above 0"),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0, not None",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention is true",
        ),
        ({"model_type": "gemma2", "hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"model_type": "gemma2", "sliding_window": None}, "there is no sliding_window"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "features of a head cannot be rotated"),
    ],
)
def test_settings_of_one_family_are_checked_too(change, message):
    assert message in refusal(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not an integer from 1 to 65536"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4, not an integer"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4', not an integer"),
        ({"num_attention_heads": [4]}, "num_attention_heads is a list of 1, not an integer"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2, not an integer"),
        ({"num_key_value_heads": "x"}, "num_key_value_heads is 'x', not an integer"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, not an integer"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0, not an integer"),
        ({"hidden_size": 33}, "hidden_size 33 is no multiple of 4 heads"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": True}, "vocab_size is true"),
        ({"vocab_size": 10**5000}, "vocab_size is an integer of more than 40 digits"),
        ({"rms_norm_eps": None}, "rms_norm_eps is null, not a number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x', not a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": "x"}, "rope_theta is 'x', not a number"),
        ({"rope_theta": 10**400}, "rope_theta is an integer of more than 40 digits"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": 5}, "rope_scaling is 5, not an object"),
        ({"rope_scaling": "x"}, "rope_scaling is 'x', not an object"),
        ({"rope_scaling": [1]}, "rope_scaling is a list of 1, not an object"),
        ({"rope_scaling": {"rope_type": [1]}}, "rope scaling a list of 1 is not supported"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope scaling 'dynamic' is not supported",
        ),
        ({"rope_scaling": {**LINEAR, "factor": None}}, "rope_scaling: factor is null"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "settings by kind of layer"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"head_dim": -16}, "head_dim is -16"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not an integer from 1 to 4096"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "layer_types has 1 entries for 4 layers",
        ),
        ({"model_type": "qwen2", "layer_types": ["x"] * 4}, "layer_types is a list of 4, not a list"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "no sliding_window in use"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, "full layers are not supported"),
        ({"model_type": ["llama"]}, "architecture a list of 1 is not supported"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [2, None]}, "eos_token_id is a list of 2"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
        ({"attention_bias": True, "model_type": "mistral"}, "attention_bias is not supported for mistral"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config an object of 1 is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder true is not supported, only false"),
    ],
)
def test_wrong_types_and_ranges_are_refused_by_name(change, message):
    assert message in refusal(change)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ([], "an unnamed method"),
    ],
)
def test_weights_that_are_quantised_already_are_named(settings, named):
    assert refusal({"quantization_config": settings}) == (
        f"its weights are quantised already ({named}); bring the model in 16 or 32 bits"
    )


def test_of_two_places_for_a_rotary_scaling_the_older_name_decides_as_in_transformers():
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    config = config_from_hf({**BASE, "rope_parameters": plain, "rope_scaling": LINEAR})
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    config = config_from_hf({**BASE, "rope_parameters": {**LINEAR, "factor": 2.0}, "rope_scaling": {}})
    assert config.rope_scaling.factor == 2.0
    message = refusal({"rope_parameters": {**plain, "rope_theta": 1e6}, "rope_scaling": LINEAR})
    assert message == "rope_theta is 10000 where the scaling is read, but 1e+06 beside it; keep one"
    assert "rope_theta" in refusal({"rope_parameters": plain, "rope_theta": 5e5})


def test_a_null_scaling_and_swish_mean_what_is_usual():
    config = config_from_hf({**BASE, "rope_scaling": None, "rope_parameters": None})
    assert config == config_from_hf({**BASE, "hidden_act": "swish", "use_cache": False})


def test_yarn_and_longrope_take_their_defaults_from_the_positions():
    yarn = config_from_hf({**BASE, "rope_scaling": {"type": "yarn", "factor": 4.0}}).rope_scaling
    assert yarn.original_max_position_embeddings == 64
    assert yarn.attention_factor == pytest.approx(1.1386294361)  # 0.1 ln 4 + 1
    deepseek = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    weighted = config_from_hf({**BASE, "rope_scaling": deepseek}).rope_scaling
    assert weighted.attention_factor == pytest.approx(1.1386294361 / 1.0693147181)
    longrope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    stated = {**BASE, "rope_scaling": longrope, "original_max_position_embeddings": 16}
    scaling = config_from_hf(stated).rope_scaling
    assert (scaling.factor, scaling.original_max_position_embeddings) == (4.0, 16)
    assert scaling.attention_factor == pytest.approx(1.5**0.5)  # sqrt(1 + ln 4 / ln 16)
    assert "4 factors for 8 rotated pairs" in refusal({"rope_scaling": longrope, "head_dim": 16})
    config = config_from_hf(stated)
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
