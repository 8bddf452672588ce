"""The whole-model transform, on a small random decoder and on a small real one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import twla_jax
from twla_jax.core import kotms, tensors
from twla_jax.errors import TwlaError
from twla_jax.models.blocks import State, run, site_inputs
from twla_jax.models.decoder import Decoder
from twla_jax.models.io import readers
from twla_jax.quantization import block, pipeline, rotation_fitting, stream
from twla_jax.quantization.site import swept

from helpers import tiny
from helpers.compiled import compiled_programs
from helpers.tiny import assert_same

RECIPE, WINDOWS = tiny.RECIPE, tiny.WINDOWS


def test_every_linear_becomes_ternary_and_the_original_stays(model, quantised):
    result, _ = quantised
    for site in result.sites:
        assert result.blocks.transform(site).rotation is not None
        for name in site.linears:
            before = getattr(model.blocks, name).kernel.get_value()
            after = getattr(result.blocks, name).kernel.get_value()
            assert isinstance(after, tensors.TernaryTensor)
            assert after.shape == (before.shape[0], before.shape[2], before.shape[1])
            assert not isinstance(before, tensors.TernaryTensor)
    assert result.embed.get_value() is model.embed.get_value()


def test_reported_errors_are_those_on_inputs_that_passed_the_quantised_part(model, quantised):
    """Recomputed in float64 from the finished model, layer by layer."""
    result, figures = quantised
    reported = {(entry["layer"], entry["site"]): entry["output_error"] for entry in figures["sites"]}
    state = State(result.embed_tokens(jnp.asarray(WINDOWS)))
    for index in range(3):
        layer, original = (jax.tree.map(lambda leaf, i=index: leaf[i], m.blocks) for m in (result, model))
        inputs, state = site_inputs(layer, state, result.context(WINDOWS.shape[1]).layer(index))
        for site in result.sites:
            rotation = layer.transform(site).rotation.get_value()
            h = np.asarray(kotms.rotate(inputs[site.name], rotation.left, rotation.right), np.float64)
            h = h.reshape(-1, h.shape[-1])
            error = energy = 0.0
            for name in site.linears:
                w = np.asarray(
                    kotms.rotate(
                        jnp.asarray(getattr(original, name).kernel.get_value().T),
                        rotation.left,
                        rotation.right,
                    )
                )
                approximation = np.asarray(tensors.dequantize(getattr(layer, name).kernel.get_value()))
                error += np.square(h @ (w - approximation).astype(np.float64).T).sum()
                energy += np.square(h @ w.astype(np.float64).T).sum()
            np.testing.assert_allclose(reported[index, site.name], error / energy, rtol=1e-3)


def test_what_the_stream_lacks_is_summed_beside_the_inputs_of_what_is_added_to_it(model, monkeypatch):
    """Recomputed in float64 from the two models, layer by layer."""
    found, real = [], block.quantize_site

    def recorded(*arguments, settings):
        found.append(None if arguments[-1] is None else np.asarray(arguments[-1]))  # which is donated
        return real(*arguments, settings=settings)

    monkeypatch.setattr(block, "quantize_site", recorded)
    recipe = RECIPE.updated({"weights": {"compensation": {"stream": 0.5}}})
    result, _ = pipeline.quantize_blocks(model, WINDOWS, recipe.quantization, progress=False)
    states = {m: State(m.embed_tokens(jnp.asarray(WINDOWS))) for m in (result, model)}
    for index in range(3):
        context = model.context(WINDOWS.shape[1]).layer(index)
        blocks = {m: jax.tree.map(lambda leaf, i=index: leaf[i], m.blocks) for m in states}
        inputs, _ = site_inputs(blocks[result], states[result], context)
        for at, site in enumerate(model.sites):
            lack = found.pop(0)
            assert (lack is not None) == site.writes
            if lack is None:
                continue
            exact, x = (
                np.asarray(run(blocks[m], states[m], context, 0, at).x, np.float64) for m in (model, result)
            )
            h = np.asarray(inputs[site.name], np.float64)
            expected = np.einsum("btn,btm->nm", exact - x, h)
            np.testing.assert_allclose(lack, expected, atol=1e-3 * max(np.abs(expected).max(), 1e-3))
        states = {m: run(blocks[m], states[m], context) for m in states}


def test_rotations_may_look_at_the_inputs(model, quantised):
    aware = dataclasses.replace(RECIPE, rotation=dataclasses.replace(RECIPE.rotation, range_weight=1.0))
    result, figures = pipeline.quantize_blocks(model, WINDOWS, aware.quantization, progress=False)
    for site in figures["sites"]:
        before, after = site["rotation_loss"]
        assert after < before
    before, after = (each.blocks.down_input.rotation.get_value().left for each in (quantised[0], result))
    assert np.abs(np.asarray(before, np.float32) - np.asarray(after, np.float32)).max() > 1e-3


def test_rotations_of_another_model_are_taken_as_they_are(model, quantised, monkeypatch):
    blocks = quantised[0].blocks
    rotations = {site.name: blocks.transform(site).rotation.get_value() for site in model.sites}
    monkeypatch.setattr(rotation_fitting, "fit_rotations", None)
    result, figures = pipeline.quantize_blocks(
        model, WINDOWS, RECIPE.quantization, rotations=rotations, progress=False
    )
    assert_same(result, quantised[0])
    assert {site["rotation_loss"] for site in figures["sites"]} == {None}


def test_a_stream_on_the_host_gives_the_same(model, quantised, monkeypatch):
    monkeypatch.setattr(stream, "_device_bytes", lambda: 1)
    result, _ = pipeline.quantize_blocks(model, WINDOWS, RECIPE.quantization, progress=False)
    assert_same(result, quantised[0])
    monkeypatch.setattr(stream, "host_bytes", lambda: 1)  # and one in a file
    result, _ = pipeline.quantize_blocks(model, WINDOWS, RECIPE.quantization, progress=False)
    assert_same(result, quantised[0])


def test_windows_that_fill_up_a_batch_count_for_nothing(model, quantised, monkeypatch):
    monkeypatch.setattr(stream, "BATCH_TOKENS", 5 * WINDOWS.shape[1])  # of 12 windows
    _, figures = pipeline.quantize_blocks(model, WINDOWS, RECIPE.quantization, progress=False)
    for one, other in zip(figures["sites"][:4], quantised[1]["sites"][:4], strict=True):
        np.testing.assert_allclose(one["output_error"], other["output_error"], rtol=0.02)


def test_an_overflowing_layer_is_named(tiny_config):
    model = jax.tree.map(np.asarray, Decoder(tiny_config, rngs=nnx.Rngs(0), dtype=jnp.float16))
    kernel = np.array(model.blocks.up.kernel.get_value())
    kernel[1] *= 1e6
    model.blocks.up.kernel = nnx.Param(kernel)
    with pytest.raises(TwlaError, match=r"block 1, input mlp: .* float16"):
        pipeline.quantize_blocks(model, WINDOWS, RECIPE.quantization, progress=False)


def test_tokens_outside_the_vocabulary_are_refused(model):
    with pytest.raises(TwlaError, match="token id 97"):
        pipeline.quantize_blocks(model, WINDOWS + 1, RECIPE.quantization, progress=False)


@pytest.mark.slow
def test_a_real_model_keeps_its_language(stories):
    """stories260K: the quantised model predicts its own stories far better than chance, 8 bits cost next to nothing."""
    model = readers.load_model(stories)
    start = np.ones((10, 1), np.int32)
    text = twla_jax.generate(model, start, max_new_tokens=95, temperature=1.0, eos_token_ids=())
    windows = np.concatenate([start, text], axis=1)
    result, figures = pipeline.quantize_blocks(model, windows[:8], RECIPE.quantization, progress=False)

    def nll(model, bits):
        model = twla_jax.set_activation_bits(model, bits)
        return twla_jax.evaluate(model, windows[8:], progress=False)["nll"]

    full = twla_jax.evaluate(model, windows[8:], progress=False)["nll"]
    assert full < nll(result, 16) < 0.85 * np.log(model.config.vocab_size)
    assert nll(result, 8) < nll(result, 16) + 0.02
    assert all(entry["rotation_loss"][1] < entry["rotation_loss"][0] for entry in figures["sites"])


@pytest.mark.slow
def test_propagation_brings_outputs_nearer_to_full_precision(stories):
    model = readers.load_model(stories)
    start = np.ones((40, 1), np.int32)
    text = twla_jax.generate(model, start, max_new_tokens=63, temperature=1.0, eos_token_ids=())
    windows = np.concatenate([start, text], axis=1)

    def nll(propagation):
        recipe = RECIPE.updated({"weights": {"compensation": {"propagation": propagation}}})
        result, _ = pipeline.quantize_blocks(model, windows[:32], recipe.quantization, progress=False)
        return twla_jax.evaluate(result, windows[32:], progress=False)["nll"]

    assert nll(0.5) < nll(0.0) - 0.05


def test_another_seed_compiles_nothing_anew(model, quantised):
    compiled = compiled_programs(rotation_fitting._fit_chunk), compiled_programs(swept)
    assert min(compiled) > 0
    seeded = dataclasses.replace(
        RECIPE,
        rotation=dataclasses.replace(RECIPE.rotation, seed=5),
        calibration=dataclasses.replace(RECIPE.calibration, seed=5),
    )
    other, _ = pipeline.quantize_blocks(model, WINDOWS, seeded.quantization, progress=False)
    assert compiled == (
        compiled_programs(rotation_fitting._fit_chunk),
        compiled_programs(swept),
    )
    assert jax.tree.structure(other) == jax.tree.structure(quantised[0])
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(*map(jax.tree.leaves, (other, quantised[0])), strict=True)
    )
