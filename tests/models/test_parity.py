"""The decoder against transformers' PyTorch models in float32, whose outputs `tests/goldens/make_goldens.py` kept."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twla_jax.inference.execution import for_inference
from twla_jax.models.families import FAMILIES
from twla_jax.models.io.readers import load_model

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN_NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz") if path.stem != "smollm2")
decode = jax.jit(lambda model, tokens, cache: model.decode(tokens, cache))
forward = jax.jit(lambda model, tokens: model(tokens))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_equal_those_of_the_pytorch_model(name, golden, tmp_path):
    case = golden(name)
    logits = forward(load_model(case.write(tmp_path)), case.tokens)
    assert logits.dtype == jnp.float32
    case.assert_logits(logits)


def test_the_goldens_cover_every_supported_family(golden):
    assert {golden(name).config["model_type"] for name in GOLDEN_NAMES} == set(FAMILIES)


@pytest.mark.parametrize(
    "name", ["smollm3", "granite", "gemma3_linear", "gemma2", "olmo3_yarn", "phi3", "gpt_oss"]
)
def test_tokens_that_follow_a_cache_have_the_logits_of_the_whole(name, golden, tmp_path):
    case = golden(name)
    model = load_model(case.write(tmp_path))
    cache, found = model.init_cache(2, case.tokens.shape[1]), []
    for start, end in ((0, 9), *((i, i + 1) for i in range(9, case.tokens.shape[1]))):
        h, cache = decode(model, jnp.asarray(case.tokens[:, start:end]), cache)
        found.append(h)
    case.assert_logits(model.logits(jnp.concatenate(found, axis=1)))


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "olmo3_yarn", "phi3", "granite", "smollm3", "qwen3_moe", "gpt_oss"]
)
def test_in_bfloat16_a_family_stays_near_its_float32(name, golden, tmp_path):
    """Embedding scales, softcaps, norms after a sublayer and routers are where a narrow type would tell."""
    case = golden(name)
    logits = np.asarray(forward(load_model(case.write(tmp_path), dtype=jnp.bfloat16), case.tokens))
    assert logits.dtype == np.float32
    error = np.abs(logits - case.logits).mean() / np.abs(case.logits).mean()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "granite", "gemma2", "gpt_oss"])
def test_packed_blocks_of_other_families_compute_the_same(name, golden, tmp_path):
    case = golden(name)
    packed, words = for_inference(jax.tree.map(jnp.asarray, load_model(case.write(tmp_path))), "on")
    assert words.endswith(f"; attention of {case.config['model_type']} runs in XLA")
    case.assert_logits(forward(packed, case.tokens))
    cache = packed.init_cache(2, 24)
    h, cache = decode(packed, jnp.asarray(case.tokens[:, :8]), cache)
    h, _ = decode(packed, jnp.asarray(case.tokens[:, 8:9]), cache)
    np.testing.assert_allclose(
        np.asarray(packed.logits(h))[:, 0], case.logits[:, 8], atol=1e-4 * np.abs(case.logits).max()
    )


def test_smollm2_equals_transformers_reading_of_the_same_file(smollm2):
    stored = np.load(GOLDENS / "smollm2.npz")
    logits = np.asarray(forward(load_model(smollm2), stored["tokens"]))[0, stored["positions"]]
    np.testing.assert_array_equal(logits.argmax(-1), stored["likeliest"])
    assert np.abs(logits[:, stored["ids"]] - stored["logits"]).max() <= 1e-4 * stored["scale"]
