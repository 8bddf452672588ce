"""Refinement in the memory of a few blocks: the gradient of the whole model, and narrow latents that lose nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twla_jax.errors import TwlaError
from twla_jax.models.decoder import Decoder
from twla_jax.refinement import descent, end_to_end
from twla_jax.refinement.latents import init_latents
from twla_jax.refinement.streamed import StreamedTraining, round_by_chance
from twla_jax.refinement_settings import EndToEndSettings
from twla_jax.storage import resume

WHOLE = EndToEndSettings(batch=4, code_rate=1e-2, scale_rate=5e-3, dtype="float32")
NARROW = dataclasses.replace(WHOLE, streaming=True, latents="bfloat16")
WINDOWS = np.random.default_rng(0).integers(0, 97, (24, 24)).astype(np.int32)


@pytest.fixture
def models(tiny_config, tiny_ternary):
    return tiny_ternary, Decoder(tiny_config, rngs=nnx.Rngs(0))


def test_gradients_are_those_of_the_whole_model(models):
    student, teacher = (descent.training_form(model, jnp.float32) for model in models)
    settings = dataclasses.replace(WHOLE, streaming=True, rotation_rate=1e-3)
    whole = end_to_end.WholeTraining(student, teacher, init_latents(student, teacher), settings, 16)
    streamed = StreamedTraining(student, teacher, settings)
    assert float(streamed.loss(WINDOWS[:4])) == pytest.approx(float(whole.loss(WINDOWS[:4])), rel=1e-5)
    whole = end_to_end.WholeTraining(student, teacher, init_latents(student, teacher), settings, 16)
    # Steps of no length: what they leave are Adam's moments, of which the first is a tenth of the gradient.
    rates = dict.fromkeys(settings.peak_rates, 0.0)
    losses = [float(training.step(WINDOWS[:4], rates, 0)) for training in (whole, streamed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    expected = dict(jax.tree_util.tree_leaves_with_path(tuple(whole.values)))
    compared = 0
    for index, values in enumerate(streamed.values):
        last = index == student.config.num_layers
        for path, leaf in jax.tree_util.tree_leaves_with_path(values):
            of_block = leaf.ndim > 0 and not last
            other = np.asarray(expected[path])[index] if of_block else expected[path]
            np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4 * np.abs(other).max(), err_msg=path)
            compared += leaf.size
    assert compared == sum(
        leaf.size if leaf.ndim else student.config.num_layers + 1 for leaf in expected.values()
    )


def test_narrow_latents_learn_as_well_as_wide_ones(models):
    windows = np.tile(WINDOWS, (4, 1))
    refined, before = end_to_end.refine(*models, windows, WHOLE, progress=False)
    narrow, after = end_to_end.refine(*models, windows, NARROW, progress=False)
    assert after["first_batch"][0] == pytest.approx(before["first_batch"][0], rel=1e-2)
    gained, other = (each["first_batch"][0] - each["first_batch"][1] for each in (before, after))
    assert other == pytest.approx(gained, rel=0.1)
    assert 0 < after["flipped"] < 1
    for one, two in zip(jax.tree.leaves(refined), jax.tree.leaves(narrow), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)


def test_an_interrupted_streaming_refinement_goes_on_to_the_same_result(models, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "_SNAPSHOT_SECONDS", 0)
    whole, figures = end_to_end.refine(*models, WINDOWS, NARROW, progress=False)
    save = resume.WorkDir.save

    def interrupted(self, name, arrays):
        save(self, name, arrays)
        if len(arrays["losses"]) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume.WorkDir, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        end_to_end.refine(*models, WINDOWS, NARROW, work_dir=tmp_path / "work", progress=False)
    monkeypatch.setattr(resume.WorkDir, "save", save)
    resumed, again = end_to_end.refine(*models, WINDOWS, NARROW, work_dir=tmp_path / "work", progress=False)
    assert again == figures
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rounding_by_chance_keeps_the_mean():
    x = jnp.asarray([0.7001, -1.3333, 1e-4, 0.0, -1.5, 3.0], jnp.float32)
    rounded = round_by_chance(jnp.tile(x, (20000, 1)), jax.random.key(0)).astype(jnp.float32)
    low, high = rounded.min(0), rounded.max(0)
    np.testing.assert_array_equal(low[3:], x[3:])  # bfloat16 holds these
    np.testing.assert_array_equal(high[3:], x[3:])
    # The numbers beside x, and none else: no further apart than 8 bits say.
    assert (low[:3] < x[:3]).all()
    assert (x[:3] < high[:3]).all()
    assert (high[:3] - low[:3] <= jnp.abs(x[:3]) / 128).all()
    error = 5 * (high - low) / 2 / np.sqrt(20000)
    assert (jnp.abs(rounded.mean(0) - x) <= error + 1e-7).all()


def test_steps_fill_the_minutes_that_there_are(models, tmp_path, monkeypatch):
    class Clock:
        now = 0.0

        def step(self, tokens, rates, number):
            assert set(rates.values()) == {0.0}
            self.now += 2
            return 0.0

    clock, store = Clock(), resume.WorkDir(tmp_path / "work", "a")
    monkeypatch.setattr(end_to_end.time, "perf_counter", lambda: clock.now)
    settings = dataclasses.replace(WHOLE, minutes=2)
    steps = end_to_end._planned(clock, WINDOWS[:4], settings, store, clock.now)
    # Of 2 minutes a twentieth is kept back, and four steps of 2 s are over.
    assert steps == (0.95 * 120 - 8) // 2
    assert end_to_end._planned(None, WINDOWS[:4], settings, store, clock.now) == steps


def test_windows_are_seen_again_where_there_is_time(models, monkeypatch):
    monkeypatch.setattr(end_to_end, "_planned", lambda *_: 7)
    settings = dataclasses.replace(WHOLE, minutes=1)
    _, figures = end_to_end.refine(*models, WINDOWS[:8], settings, progress=False)
    assert (figures["steps"], figures["tokens"]) == (7, 7 * 4 * 24)


def test_only_a_streaming_refinement_has_narrow_latents():
    with pytest.raises(TwlaError, match=r"refine\.end_to_end\.latents"):
        EndToEndSettings(latents="bfloat16")
    with pytest.raises(TwlaError, match=r"refine\.end_to_end\.offload"):
        EndToEndSettings(offload=True)
