"""On a mesh of eight simulated devices everything is what it is on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from twla_jax.core import quantizers, tensors
from twla_jax.core.settings import (
    ActivationSettings,
    CompensationSettings,
    IntegerSettings,
    RotationSettings,
    TernarySettings,
    TwoPlaneSettings,
    WeightSettings,
)
from twla_jax.errors import TwlaError
from twla_jax.inference.generation import generate
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.models import sharding
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import shallow_copy
from twla_jax.models.sites import set_activation_bits
from twla_jax.quantization import block, pipeline, rotation_fitting
from twla_jax.quantization.site import over_all, rotated_rows
from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint

RECIPE = Recipe(
    weights=WeightSettings(
        quantizer=TernarySettings(euclidean_steps=3, rounds=1), compensation=CompensationSettings(stream=0.5)
    ),
    rotation=RotationSettings(steps=3),
    activations=ActivationSettings(clips=(1.0, 0.8), clip_tokens=64),
)
# A batch of these is filled up on the mesh; and their tokens outnumber the columns of any input.
WINDOWS = np.random.default_rng(0).integers(0, 96, (6, 256)).astype(np.int32)


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
def calibrated(model):
    """The model quantised on one device, and for each site what was gathered for it and what was made of that."""
    sites, quantize_site = [], block.quantize_site

    def recorded(kernels, rotation, *gathered, settings):
        before = jax.tree.map(np.array, gathered)  # which are donated
        made = quantize_site(kernels, rotation, *gathered, settings=settings)
        sites.append((before, jax.device_get(made)))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "quantize_site", recorded)
        return pipeline.quantize_blocks(model, WINDOWS, RECIPE.quantization, progress=False)[0], sites


@pytest.fixture(scope="module")
def quantised(calibrated):
    return calibrated[0]


def test_every_leaf_has_a_sharding_and_packed_ones_are_split(quantised, mesh):
    placed = sharding.shardings(quantised, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(quantised)
    q, down, o = (getattr(placed.blocks, name).kernel.get_value() for name in ("q", "down", "o"))
    assert q.codes.spec == q.alpha.spec == q.mu.spec == P(None, "model", None)
    assert down.codes.spec == down.alpha.spec == P(None, None, "model")
    assert o.codes.spec == P(None, "model", None)  # one tile of 64 columns is not cut
    assert placed.embed.get_value().spec == P("model", None)
    jax.block_until_ready(jax.device_put(quantised, placed))


def test_logits_agree_with_one_device(quantised, mesh):
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = jnp.asarray(WINDOWS[:4])
    single = forward(jax.tree.map(jnp.asarray, quantised), tokens)
    sharded = forward(
        jax.device_put(quantised, sharding.shardings(quantised, mesh)),
        jax.device_put(tokens, sharding.batch_sharding(mesh)),
    )
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, single, atol=1e-3 * np.abs(single).max())


def test_a_checkpoint_restores_onto_one_device_and_onto_the_mesh(quantised, mesh, tmp_path):
    checkpoint.save(quantised, None, tmp_path / "out", RECIPE, {})
    for place in (None, mesh):
        restored, _, _ = checkpoint.load(tmp_path / "out", mesh=place)
        for before, after in zip(jax.tree.leaves(quantised), jax.tree.leaves(restored), strict=True):
            np.testing.assert_array_equal(before, after)
    expected = sharding.shardings(quantised, mesh)
    for leaf, where in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)


@pytest.mark.slow
def test_calibration_on_the_mesh_is_that_on_one_device(model, calibrated, mesh, monkeypatch):
    """Every site on the mesh gets what one device made of those before it, as the rounding of a sum may tip a code.

    One tipped code makes others of what follows, which are no worse but not the same. So what is gathered must agree to
    float32 rounding, and the codes made of it must be as good; and the result is put together from the same parts.
    """
    result, sites = calibrated
    quantize_site, rest = block.quantize_site, iter(sites)

    def compared(kernels, rotation, *gathered, settings):
        (moment, sample, tokens, error_moment, lack), made = next(rest)
        assert len(kernels[0].sharding.device_set) == 8
        at_most = 1e-5 * np.abs(moment).max()
        np.testing.assert_allclose(gathered[0], moment, atol=at_most)
        np.testing.assert_allclose(gathered[3], error_moment, atol=at_most)
        if lack is not None:
            np.testing.assert_allclose(gathered[4], lack, atol=at_most)
        # After the tokens there are those of the windows that fill up the batch.
        np.testing.assert_allclose(gathered[1][: len(sample)], sample, atol=1e-5 * np.abs(sample).max())
        assert not gathered[1][len(sample) :].any()
        assert gathered[2] == tokens
        found = quantize_site(kernels, rotation, *gathered, settings=settings)
        for name, figure in made[2].items():
            np.testing.assert_allclose(found[2][name], figure, rtol=0.01, err_msg=name)
        for here, one in zip(found[0], made[0], strict=True):
            here, one = tensors.dequantize(here), tensors.dequantize(one)
            assert jnp.square(here - one).sum() < 0.1 * jnp.square(one).sum()
        return jax.tree.map(lambda one, here: jax.device_put(one, here.sharding), made, found)

    def fit_on_one_device(model, samples, settings, store, mesh, progress):
        return fit_rotations(model, samples, settings, store, None, progress)

    fit_rotations = rotation_fitting.fit_rotations
    monkeypatch.setattr(rotation_fitting, "fit_rotations", fit_on_one_device)
    monkeypatch.setattr(block, "quantize_site", compared)
    on_mesh, _ = pipeline.quantize_blocks(model, WINDOWS, RECIPE.quantization, mesh=mesh, progress=False)
    assert next(rest, None) is None
    jax.tree.map(np.testing.assert_array_equal, on_mesh, result)


def test_devices_with_the_same_weights_share_the_sweep_of_their_rows(mesh):
    rng, everywhere = np.random.default_rng(0), jax.sharding.NamedSharding(mesh, P())
    kernels = [rng.normal(size=(16, n)).astype(np.float32) for n in (24, 8)]
    placed = tuple(jax.device_put(kernel, everywhere) for kernel in kernels)
    rows, _ = rotated_rows(placed, None, jnp.ones((4, 16)), over=over_all(placed))
    assert rows.sharding.shard_shape(rows.shape) == (32 // mesh.size, 16)
    np.testing.assert_array_equal(rows, np.concatenate([kernel.T for kernel in kernels]))
    assert over_all(placed[:1]) is not None
    assert over_all((placed[0][:, :3],)) is None  # which eight devices do not divide


def test_rotations_are_fitted_on_the_mesh_as_on_one_device(model, mesh):
    """Of two blocks on eight devices, six of which fit the last one once more."""
    (one, losses), (split, found) = (
        rotation_fitting.fit_rotations(model, {}, RECIPE.rotation, None, each, False) for each in (None, mesh)
    )
    for site, rotation in one.items():
        np.testing.assert_allclose(found[site], losses[site], atol=1e-5)  # some are nearly 0
        for side in ("left", "right"):
            np.testing.assert_allclose(getattr(split[site], side), getattr(rotation, side), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 16])
def test_a_prepared_model_generates_on_the_mesh_what_it_does_on_one_device(quantised, mesh, bits):
    result = jax.tree.map(jnp.asarray, set_activation_bits(quantised, bits))
    one, split = (
        prepare_for_inference(result, unpack=False),
        prepare_for_inference(result, mesh=mesh, unpack=False),
    )
    gate_up = split.blocks[0].mlp_linear.weight.get_value()
    assert gate_up.codes.sharding.spec == P("model")
    assert gate_up.codes.shape[0] == 2
    prompts = WINDOWS[:4, :8]
    logits = (jax.jit(lambda model, tokens: model(tokens))(model, prompts) for model in (one, split))
    np.testing.assert_allclose(*logits, atol=1e-4)
    texts = (generate(model, prompts, max_new_tokens=6, eos_token_ids=()) for model in (one, split))
    np.testing.assert_array_equal(*texts)


def test_other_weights_are_split_as_one_plane_is(model, mesh):
    shapes = {}
    for name, kind in (("two", TwoPlaneSettings()), ("integers", IntegerSettings())):
        levels, other = quantizers.quantizer(WeightSettings(quantizer=kind)), shallow_copy(model)
        for part, m in (("q", 64), ("down", 1024)):
            linear = getattr(other.blocks, part)
            n = linear.kernel.get_value().shape[-1]
            scales = (jnp.ones((2, n, -(-m // 128))),) * (3 if name == "two" else 2)
            linear.kernel = nnx.Param(levels.pack(jnp.zeros((2, n, m)), scales, 128))
        placed = sharding.shardings(other, mesh)
        jax.block_until_ready(jax.device_put(other, placed))
        shapes[name] = [getattr(placed.blocks, part).kernel.get_value() for part in ("q", "down")]
    q, down = shapes["two"]
    assert q.codes.spec == q.residual_codes.spec == q.residual_ratio.spec == P(None, "model", None)
    assert down.residual_codes.spec == down.residual_ratio.spec == down.codes.spec == P(None, None, "model")
    q, down = shapes["integers"]
    assert q.codes.spec == down.codes.spec == down.scale.spec == P(None, "model", None)


def test_a_mesh_is_named_by_its_axes():
    mesh = sharding.make_mesh("model=4,data=2")
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    assert dict(sharding.make_mesh("model=2").shape) == {"data": 1, "model": 2}
    for text, message in (
        ("data=4,model=4", "needs 16 devices, but there are 8"),
        ("rows=2", "must be like data=2,model=4"),
        ("model=0", "must be like"),
        ("model", "must be like"),
        ("data=2,data=4", "must be like"),
    ):
        with pytest.raises(TwlaError, match=message):
            sharding.make_mesh(text)
