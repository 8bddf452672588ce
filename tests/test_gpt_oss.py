"""gpt-oss goes all the way: quantised, refined, evaluated, saved, loaded, packed, and decoded in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import twla_jax
from twla_jax.core.settings import (
    ActivationSettings,
    QuantizationSettings,
    RotationSettings,
    TernarySettings,
    WeightSettings,
)
from twla_jax.core.tensors import TernaryTensor
from twla_jax.models.io.huggingface import load_model
from twla_jax.models.layers import replace
from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint

import check_odd_numbers as odd
from helpers.golden import Golden

SETTINGS = QuantizationSettings(
    weights=WeightSettings(quantizer=TernarySettings(euclidean_steps=3, rounds=1)),
    rotation=RotationSettings(steps=2),
    activations=ActivationSettings(bits=8, clips=(1.0, 0.8), clip_tokens=32),
)
forward = jax.jit(lambda model, tokens: model(tokens))
decode = jax.jit(lambda model, tokens, cache: model.decode(tokens, cache))


@pytest.fixture(scope="module")
def case():
    return Golden("gpt_oss")


@pytest.fixture(scope="module")
def original(case, tmp_path_factory):
    """The model in float32, on the host."""
    folder = tmp_path_factory.mktemp("original")
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), load_model(case.write(folder)))


@pytest.fixture(scope="module")
def quantized(original, case, tmp_path_factory):
    """The model after quantising, a folder and reading it again, without rounding of activations."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    made, report = twla_jax.quantize_blocks(original, case.tokens, SETTINGS, progress=False)
    assert {site["site"] for site in report["sites"]} == {"qkv", "o", "mlp", "down"}
    checkpoint.save(made, None, folder / "out", Recipe(name="oss"), {})
    return twla_jax.set_activation_bits(checkpoint.load(folder / "out")[0], bits=16)


def test_only_matrices_of_linears_become_ternary(quantized, case):
    blocks = quantized.blocks
    for site in quantized.sites:
        assert all(isinstance(each.kernel.get_value(), TernaryTensor) for each in blocks.linears(site))
    for layer in range(2):
        front = f"model.layers.{layer}"
        for stored, held in (
            (f"{front}.self_attn.sinks", blocks.sinks),
            (f"{front}.mlp.router.weight", blocks.router.kernel),
            (f"{front}.mlp.router.bias", blocks.router.bias),
            (f"{front}.mlp.experts.down_proj_bias", blocks.down.bias),
        ):
            value = np.asarray(held.get_value()[layer], np.float32)
            np.testing.assert_array_equal(value.T if "weight" in stored else value, case.weights[stored])


def test_its_perplexity_is_that_of_its_logits(quantized, case):
    logits = np.asarray(forward(quantized, case.tokens), np.float64)[:, :-1]
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, case.tokens[:, 1:, None], -1)[..., 0]
    found = twla_jax.evaluate(quantized, case.tokens, progress=False)
    assert found["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-5)


@pytest.mark.parametrize("dtype", [None, jnp.int8])
def test_packed_it_decodes_past_its_windows_as_the_whole_text_says(quantized, case, dtype):
    """Sinks and windows, in prompts cut into parts and token by token; entries in int8 change little."""
    expected = np.asarray(forward(quantized, case.tokens))
    packed = twla_jax.prepare_for_inference(quantized, unpack=False)
    cache, found = packed.init_cache(2, 24, dtype), []
    for start, end in ((0, 9), (9, 18), *((at, at + 1) for at in range(18, 24))):
        h, cache = decode(packed, jnp.asarray(case.tokens[:, start:end]), cache)
        found.append(packed.logits(h))
    scale = np.abs(expected).max()
    allowed = 1e-4 if dtype is None else 0.05
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=allowed * scale)


def test_it_generates_what_the_logits_say(quantized, case):
    packed = twla_jax.prepare_for_inference(quantized, unpack=True)
    found = np.asarray(twla_jax.generate(packed, case.tokens[:, :12], max_new_tokens=2, eos_token_ids=()))
    logits = np.asarray(forward(quantized, found[:, :13]))
    np.testing.assert_array_equal(found[:, 12:], logits[:, 11:].argmax(-1))


def test_without_sinks_it_would_be_another_model(quantized, case):
    """What a kernel that does not know them would compute, far from what is allowed above."""
    gone = replace(quantized, {"blocks.sinks": jnp.full((2, 4), -1e4)})
    with_them, without = (np.asarray(forward(model, case.tokens)) for model in (quantized, gone))
    assert np.abs(with_them - without).max() > 0.1 * np.abs(with_them).max()


@pytest.mark.parametrize("kind", ["sinks that take all", "an expert without a token"])
def test_odd_numbers_stay_finite_and_the_same_in_every_form(original, case, kind):
    """Sinks that take all of the attention leave `o` an input that is always zero."""
    report = odd.check(odd.odd_models(original)[kind], case.tokens, SETTINGS)
    first = {site["site"]: site for site in report["sites"] if site["layer"] == 0}
    if "sinks" in kind:
        assert first["o"]["output_error"] == 0
    else:
        assert first["mlp"]["fewest_tokens"] == 0
