"""On a mesh of eight simulated devices everything is what it is on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from twla_jax import checkpoint, pipeline, sharding
from twla_jax.generation import generate
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import SITES, Decoder
from twla_jax.models.integer import prepare_for_inference
from twla_jax.recipe import ActivationRecipe, Recipe, RotationRecipe, WeightRecipe
from twla_jax.workflow import set_activation_bits

RECIPE = Recipe(
    weights=WeightRecipe(group_size=128, euclidean_steps=3, rounds=1),
    rotation=RotationRecipe(steps=3),
    activations=ActivationRecipe(clips=(1.0, 0.8), clip_tokens=64),
)
WINDOWS = np.random.default_rng(0).integers(0, 96, (6, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def model():
    """Wide enough that down's packed tiles divide over two devices, and narrow enough that o's do not."""
    config = DecoderConfig(
        model_type="llama",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=1024,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantised(model):
    return pipeline.quantize(model, WINDOWS, RECIPE, progress=False)


def test_every_leaf_has_a_sharding_and_packed_ones_are_split(quantised, mesh):
    result, _ = quantised
    placed = sharding.shardings(result, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(result)
    q, down, o = (getattr(placed.blocks, name).kernel.get_value() for name in ("q", "down", "o"))
    assert q.codes.spec == q.alpha.spec == q.mu.spec == P(None, "model", None)
    assert down.codes.spec == down.alpha.spec == P(None, None, "model")
    assert o.codes.spec == P(None, "model", None)  # one tile of 64 columns is not cut
    assert placed.embed.get_value().spec == P("model", None)
    jax.block_until_ready(jax.device_put(result, placed))


def test_logits_agree_with_one_device(quantised, mesh):
    result, _ = quantised
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = jnp.asarray(WINDOWS[:4])
    single = forward(jax.tree.map(jnp.asarray, result), tokens)
    sharded = forward(
        jax.device_put(result, sharding.shardings(result, mesh)),
        jax.device_put(tokens, sharding.batch_sharding(mesh)),
    )
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, single, atol=1e-3 * np.abs(single).max())


def test_a_checkpoint_restores_onto_one_device_and_onto_the_mesh(quantised, mesh, tmp_path):
    result, _ = quantised
    checkpoint.save(result, None, tmp_path / "out", RECIPE, {})
    for place in (None, mesh):
        restored, _, _ = checkpoint.load(tmp_path / "out", mesh=place)
        for before, after in zip(jax.tree.leaves(result), jax.tree.leaves(restored), strict=True):
            np.testing.assert_array_equal(before, after)
    expected = sharding.shardings(result, mesh)
    for leaf, where in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


def test_calibration_statistics_agree_to_float32_rounding(model, mesh):
    """The second moments of every input of a block, summed over a batch that is split over the mesh."""
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    x = model.embed_tokens(jnp.asarray(WINDOWS[:4]))
    real = jnp.ones(4)

    def moments(block, x, real):
        found = {}
        mixed = None
        for site, names in SITES.items():
            m = getattr(block, names[0]).kernel.get_value().shape[0]
            x, mixed, found[site], _, _ = pipeline.advance(
                block, x, mixed, real, jnp.zeros((m, m)), positions, reach, site=site, stride=1
            )
        return found

    positions, reach = model.positions(WINDOWS.shape[1]), model.windows()[0]
    split = sharding.batch_sharding(mesh)
    sharded = moments(
        jax.device_put(block, sharding.shardings(block, mesh)), *jax.device_put((x, real), split)
    )
    for site, single in moments(block, x, real).items():
        np.testing.assert_allclose(sharded[site], single, atol=1e-5 * np.abs(single).max(), err_msg=site)


def test_calibration_on_the_mesh_gives_the_same_quality(model, quantised, mesh):
    """Errors agree until the rounding of a sum tips the first code that lay on a boundary, which may happen in down,
    whose 96 tokens leave its 1024 columns undetermined; from there on only their mean can."""
    _, on_mesh = pipeline.quantize(model, WINDOWS, RECIPE, mesh=mesh, progress=False)
    one, other = (np.array([s["output_error"] for s in f["sites"]]) for f in (quantised[1], on_mesh))
    np.testing.assert_allclose(other[:3], one[:3], rtol=1e-4)
    np.testing.assert_allclose(other.mean(), one.mean(), rtol=0.02)
    assert [s["damping"] for s in on_mesh["sites"]] == [s["damping"] for s in quantised[1]["sites"]]


@pytest.mark.parametrize("bits", [4, 16])
def test_a_prepared_model_generates_on_the_mesh_what_it_does_on_one_device(quantised, mesh, bits):
    result = jax.tree.map(jnp.asarray, set_activation_bits(quantised[0], bits))
    one, split = prepare_for_inference(result), prepare_for_inference(result, mesh=mesh)
    gate_up = split.blocks[0].gate_up_linear.weight.get_value()
    assert gate_up.codes.sharding.spec == P("model")
    assert gate_up.codes.shape[0] == 2
    prompts = WINDOWS[:4, :8]
    logits = (jax.jit(lambda model, tokens: model(tokens))(model, prompts) for model in (one, split))
    np.testing.assert_allclose(*logits, atol=1e-4)
    texts = (generate(model, prompts, max_new_tokens=6, eos_token_ids=()) for model in (one, split))
    np.testing.assert_array_equal(*texts)
