"""The decoder against transformers' PyTorch models in float32, whose outputs `tests/goldens/make_goldens.py` kept."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.models.io.readers import load_model

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = sorted(path.stem for path in GOLDENS.glob("*.npz") if path.stem != "smollm2")
forward = jax.jit(lambda model, tokens: model(tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_the_pytorch_model(name, golden, tmp_path):
    case = golden(name)
    logits = forward(load_model(case.write(tmp_path)), case.tokens)
    assert logits.dtype == jnp.float32
    case.assert_logits(logits)


def test_the_goldens_cover_every_supported_family(golden):
    assert {golden(name).config["model_type"] for name in FAMILIES} == {"llama", "mistral", "qwen2", "qwen3"}


def test_smollm2_equals_transformers_reading_of_the_same_file(smollm2):
    stored = np.load(GOLDENS / "smollm2.npz")
    logits = np.asarray(forward(load_model(smollm2), stored["tokens"]))[0, stored["positions"]]
    np.testing.assert_array_equal(logits.argmax(-1), stored["likeliest"])
    assert np.abs(logits[:, stored["ids"]] - stored["logits"]).max() <= 1e-4 * stored["scale"]
