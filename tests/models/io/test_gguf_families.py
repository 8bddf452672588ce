"""Families in GGUF files: the same logits as PyTorch, or as the Hugging Face folder of the same weights."""

import math

import jax
import numpy as np
import pytest

from twla_jax.errors import TwlaError
from twla_jax.models.io.readers import load_model, read_config

from helpers.gguf_models import write

forward = jax.jit(lambda model, tokens: model(tokens))
WINDOW = ("uint32", "attention.sliding_window", 7)
THETA = ("float32", "rope.freq_base", 10000.0)
GRANITE = [
    ("float32", "embedding_scale", 12.0),
    ("float32", "logit_scale", 8.0),
    ("float32", "residual_scale", 0.22),
    ("float32", "attention.scale", 0.2),
]
OLMO3 = [WINDOW, ("array", "attention.sliding_window_pattern", [True, False])]
LONGROPE = [
    ("uint32", "attention.sliding_window", 0),
    ("uint32", "rope.dimension_count", 12),
    ("uint32", "rope.scaling.original_context_length", 16),
    ("float32", "rope.scaling.attn_factor", math.sqrt(1 + math.log(4) / math.log(16))),
]


def longrope_tensors(case):
    stated = case.config["rope_parameters"]
    return {
        "rope_factors_short.weight": stated["short_factor"],
        "rope_factors_long.weight": stated["long_factor"],
    }


@pytest.mark.parametrize(
    ("name", "architecture", "metadata"),
    [
        ("granite", "granite", GRANITE),
        ("olmo2", "olmo2", [THETA]),
        ("olmo3", "olmo2", OLMO3),
        ("phi3", "phi3", [WINDOW]),
        ("phi4_mini", "phi3", LONGROPE),
    ],
)
def test_logits_are_those_of_the_pytorch_model(name, architecture, metadata, golden, tmp_path):
    case = golden(name)
    if case.config["model_type"].startswith("olmo"):
        theta = case.config["rope_parameters"]
        theta = theta.get("full_attention", theta)["rope_theta"]
        metadata = [entry for entry in metadata if entry != THETA] + [("float32", "rope.freq_base", theta)]
    extra = longrope_tensors(case) if name == "phi4_mini" else None
    path = write(tmp_path / "model.gguf", architecture, case.config, case.weights, metadata, extra)
    model = load_model(path)
    assert model.config.model_type == case.config["model_type"]
    case.assert_logits(forward(model, case.tokens))


@pytest.mark.parametrize(
    ("name", "as_llama_cpp_has_it", "metadata"),
    [
        ("smollm3", {"no_rope_layers": [1, 1]}, []),  # every fourth layer is without, of two none
        (
            "gemma2",
            {"query_pre_attn_scalar": 16},  # scores are scaled by the head's size
            [
                WINDOW,
                ("float32", "attn_logit_softcapping", 2.0),
                ("float32", "final_logit_softcapping", 3.0),
            ],
        ),
    ],
)
def test_logits_are_those_of_the_folder_with_what_llama_cpp_takes_for_granted(
    name, as_llama_cpp_has_it, metadata, golden, tmp_path
):
    case = golden(name)
    case.config |= as_llama_cpp_has_it
    expected = np.asarray(forward(load_model(case.write(tmp_path)), case.tokens))
    theta = case.config["rope_parameters"]["rope_theta"]
    metadata = [*metadata, ("float32", "rope.freq_base", theta)]
    model = load_model(write(tmp_path / "model.gguf", name, case.config, case.weights, metadata))
    np.testing.assert_allclose(
        forward(model, case.tokens), expected, atol=1e-5 * np.abs(expected).max(), rtol=0
    )


def test_what_the_architecture_alone_says_is_known(golden, tmp_path):
    case = golden("smollm3")
    case.config["num_hidden_layers"] = 8
    path = write(tmp_path / "model.gguf", "smollm3", case.config, case.weights)
    assert read_config(path).no_rope_layers == (3, 7)
    case = golden("gemma2")
    case.config["num_hidden_layers"] = 46  # the 27B
    config = read_config(write(tmp_path / "model.gguf", "gemma2", case.config, case.weights))
    assert (config.attention_softcap, config.logit_softcap, config.sliding_window) == (50.0, 30.0, 4096)
    assert config.sliding_layers == tuple(range(0, 46, 2))
    assert config.query_scale == pytest.approx(
        math.sqrt(16 * 4 / 32)
    )  # (hidden/heads)^(−1/2), not head^(−1/2)


@pytest.mark.parametrize(
    ("name", "architecture", "entries", "message"),
    [
        (
            "olmo3",
            "olmo2",
            [
                *OLMO3,
                ("string", "rope.scaling.type", "yarn"),
                ("float32", "rope.scaling.factor", 8.0),
            ],
            "OLMo 3 with a rotary scaling is not read from GGUF",
        ),
        (
            "granite",
            "granite",
            [*GRANITE, ("bool", "rope.scaling.finetuned", False)],
            "without rotary positions",
        ),
        ("phi3", "phi3", [("uint32", "rope.dimension_count", 10)], "rotary positions on a part of the head"),
    ],
)
def test_what_would_be_guessed_is_refused(name, architecture, entries, message, golden, tmp_path):
    case = golden(name)
    path = write(tmp_path / "model.gguf", architecture, case.config, case.weights, entries)
    with pytest.raises(TwlaError, match=message) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_long_table_without_the_short_one_is_named(golden, tmp_path):
    case = golden("phi4_mini")
    extra = longrope_tensors(case)
    del extra["rope_factors_short.weight"]
    path = write(tmp_path / "model.gguf", "phi3", case.config, case.weights, LONGROPE, extra)
    with pytest.raises(TwlaError, match=r"tensor 'rope_factors_short\.weight' is missing"):
        read_config(path)
