"""Refinement and evaluation split over simulated devices take the steps that one device takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from twla_jax.core import tensors
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import evaluate
from twla_jax.models import sharding
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.refinement.blockwise import refine_blocks
from twla_jax.refinement.end_to_end import WholeTraining, refine
from twla_jax.refinement.latent_shardings import place_latents
from twla_jax.refinement.latents import init_latents
from twla_jax.refinement_settings import BlockRefinementSettings, EndToEndSettings
from twla_jax.storage import resume

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
)
WINDOWS = np.random.default_rng(0).integers(0, 32, (4, 8)).astype(np.int32)
SETTINGS = EndToEndSettings(steps=2, batch=2, dtype="float32")


@pytest.fixture(scope="module")
def teacher():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def student():
    """The teacher with the nearest ternary codes, one α a row."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    for site in model.sites:
        for name in site.linears:
            linear = getattr(model.blocks, name)
            rows = np.asarray(linear.kernel.get_value()).swapaxes(1, 2)
            alpha = np.abs(rows).mean(-1, keepdims=True) * 1.3
            codes = jnp.asarray(np.clip(np.round(rows / alpha), -1, 1), jnp.int8)
            alpha, columns = jnp.asarray(alpha), rows.shape[-1]
            linear.kernel = nnx.Param(tensors.from_codes(codes, alpha, None, columns))
        quantizer = ActivationQuantizer(
            bits=jnp.full(1, 16, jnp.int32), clips=jnp.ones((1, 4), jnp.float16), enabled=False
        )
        model.blocks.transform(site).activation = nnx.data(nnx.Param(quantizer))
    return model


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh("data=2,model=2")


def test_refinement_takes_the_steps_of_one_device(student, teacher, mesh):
    """Sums over windows are in another order on a mesh, which float32 rounds."""
    (one, figures), (split, found) = (
        refine(student, teacher, WINDOWS, SETTINGS, mesh=each, progress=False) for each in (None, mesh)
    )
    for name in ("loss", "first_batch"):
        np.testing.assert_allclose(found[name], figures[name], rtol=1e-5)
    assert figures["loss"][1] < figures["loss"][0]
    for name in ("q", "down"):
        here, there = (
            np.asarray(tensors.dequantize(getattr(each.blocks, name).kernel.get_value()))
            for each in (one, split)
        )
        np.testing.assert_allclose(there, here, atol=1e-3 * np.abs(here).max())


def test_refinement_block_by_block_takes_the_steps_of_one_device(student, teacher):
    """Of three windows, two at a time; two devices cannot share alike what they move past a block."""
    settings = BlockRefinementSettings(steps=3, batch=2, code_rate=1e-2, dtype="float32")
    mesh = sharding.make_mesh("data=2")
    (one, figures), (split, found) = (
        refine_blocks(student, teacher, WINDOWS[:3], settings, mesh=each, progress=False)
        for each in (None, mesh)
    )
    np.testing.assert_allclose(found["loss"], figures["loss"], rtol=1e-4)
    here, there = (
        np.asarray(tensors.dequantize(each.blocks.down.kernel.get_value())) for each in (one, split)
    )
    np.testing.assert_allclose(there, here, atol=1e-3 * np.abs(here).max())
    with pytest.raises(TwlaError, match="batches of 2 windows cannot be split over data=4"):
        refine_blocks(student, teacher, WINDOWS, settings, mesh=sharding.make_mesh("data=4"), progress=False)


def test_what_learns_lies_with_its_matrix(student, teacher, mesh):
    student, teacher = sharding.place(student, mesh), sharding.place(teacher, mesh)
    latents = place_latents(init_latents(student, teacher), student, mesh)
    for name in ("q", "down"):
        assert latents[name]["u"].sharding.spec == P(None, "model", None) == latents[name]["s"].sharding.spec
    assert latents["norm"]["g"].sharding.is_fully_replicated


def test_a_model_scores_what_it_does_on_one_device(teacher, mesh):
    one, split = (evaluate(teacher, WINDOWS, mesh=each, progress=False) for each in (None, mesh))
    assert split == pytest.approx(one, rel=1e-5)


def test_a_step_that_the_mesh_does_not_divide_is_refused(student, teacher):
    mesh = sharding.make_mesh("data=4")
    with pytest.raises(TwlaError, match="batches of 2 windows cannot be split over data=4"):
        refine(student, teacher, WINDOWS, SETTINGS, mesh=mesh, progress=False)


def test_what_is_gone_on_with_lies_where_it_lay_and_takes_its_place(student, teacher, mesh):
    student, teacher = sharding.place(student, mesh), sharding.place(teacher, mesh)
    training = WholeTraining(student, teacher, init_latents(student, teacher), SETTINGS, 16, mesh)
    before, saved = training.values, resume.flatten(training.values)
    training.restore(saved)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    for leaf, old in zip(jax.tree.leaves(training.values), jax.tree.leaves(before), strict=True):
        assert leaf.sharding == old.sharding
    again = resume.flatten(training.values)
    for name, array in saved.items():
        np.testing.assert_array_equal(again[name], array)
    # Not by way of one device, which may have no room for the whole.
    u = place_latents(init_latents(student, teacher), student, mesh)["q"]["u"]
    (back,) = resume.unflatten([u], {"0": np.asarray(u)})
    assert back.sharding == u.sharding


def test_a_streaming_refinement_takes_no_mesh(student, teacher, mesh):
    settings = EndToEndSettings(steps=2, batch=2, dtype="float32", streaming=True)
    with pytest.raises(TwlaError, match="runs on one device"):
        refine(student, teacher, WINDOWS, settings, mesh=mesh, progress=False)
