"""The published layout on a whole model: through pipeline, folder and accounting, in its own bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twla_jax.core.grouped_tensor import GroupedTensor
from twla_jax.core.settings import (
    ActivationSettings,
    CompensationSettings,
    GroupedSettings,
    RotationSettings,
    TernarySettings,
    WeightSettings,
)
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import evaluate
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.models.decoder import Decoder
from twla_jax.quantization import pipeline
from twla_jax.recipe import Recipe, load_recipe
from twla_jax.storage import accounting, checkpoint

RECIPE = Recipe(
    name="tiny-groups",
    weights=WeightSettings(
        quantizer=GroupedSettings(), compensation=CompensationSettings(damping=0.1, propagation=0.0)
    ),
    rotation=RotationSettings(steps=2, start="identity", factors="paper"),
    activations=ActivationSettings(clips=(1.0, 0.8), clip_tokens=64),
)
WINDOWS = np.random.default_rng(0).integers(0, 97, (4, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def model(tiny_config):
    return jax.tree.map(np.asarray, Decoder(tiny_config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def quantized(model):
    return pipeline.quantize_blocks(model, WINDOWS, RECIPE.quantization, progress=False)[0]


@pytest.mark.slow
def test_a_folder_holds_the_model_as_it_is_and_the_bits_of_every_part(quantized, tmp_path):
    folder = tmp_path / "out"
    checkpoint.save(quantized, None, folder, RECIPE, {})
    restored, _, info = checkpoint.load(folder)
    assert info.recipe == RECIPE
    kernel = restored.blocks.down.kernel.get_value()
    assert isinstance(kernel, GroupedTensor)
    assert kernel.salient_width == kernel.salient_count()  # no more room than the layer that needs most
    tokens = jnp.asarray(WINDOWS)
    np.testing.assert_array_equal(jax.jit(quantized.__call__)(tokens), jax.jit(restored.__call__)(tokens))
    size = accounting.account(folder)
    layers, linears = 3, [(42, 42), (14, 42), (14, 42), (42, 42), (78, 42), (78, 42), (42, 78)]
    bitmaps = layers * sum(n * -(-m // 8) + -(-m // 8) for n, m in linears)
    scales = layers * sum(n * 10 * 2 * -(-m // 128) for n, m in linears)
    assert size["breakdown"]["bitmaps"] == bitmaps
    assert size["breakdown"]["scales_and_offsets"] == scales
    assert size["bytes_on_disk"] == size["bytes_accounted"]


@pytest.mark.slow
def test_it_predicts_nearer_to_the_original_than_the_published_fit_in_one_plane(model, quantized):
    one_plane = Recipe(
        weights=WeightSettings(
            quantizer=TernarySettings(rounds=0, metric="group"),
            compensation=CompensationSettings(damping=0.1, propagation=0.0),
        ),
        rotation=RECIPE.rotation,
        activations=RECIPE.activations,
    )
    alone = pipeline.quantize_blocks(model, WINDOWS, one_plane.quantization, progress=False)[0]
    tokens = jnp.asarray(WINDOWS)

    def distance(other):
        return float(jnp.square(jax.jit(other.__call__)(tokens) - jax.jit(model.__call__)(tokens)).mean())

    assert distance(quantized) < distance(alone)
    assert np.isfinite(evaluate(quantized, WINDOWS, progress=False)["perplexity"])


@pytest.mark.slow
def test_kernels_and_refinement_refuse_it_in_one_line(quantized):
    with pytest.raises(TwlaError, match="published layout"):
        prepare_for_inference(quantized, unpack=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"group_size": 64},
        {"compensation": None},
        {"compensation": CompensationSettings(propagation=0.5)},
    ],
)
def test_settings_that_the_layout_does_not_have_are_refused(changes):
    settings = {
        "quantizer": GroupedSettings(),
        "compensation": CompensationSettings(propagation=0.0),
        **changes,
    }
    with pytest.raises(TwlaError, match="published layout"):
        WeightSettings(**settings)


def test_the_recipe_is_the_published_one():
    recipe = load_recipe("paper-groups")
    assert isinstance(recipe.weights.quantizer, GroupedSettings)
    assert recipe.rotation == load_recipe("paper").rotation
    assert recipe.weights.compensation == CompensationSettings(damping=0.1, propagation=0.0)
