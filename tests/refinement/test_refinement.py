"""Refinement starts from the model as it is, learns to predict as the original does, and keeps every byte count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import twla_jax
from twla_jax.core import quantizers, tensors
from twla_jax.core.activation import ActivationQuantizer, quantize_tokens
from twla_jax.core.settings import (
    TwoPlaneSettings,
    WeightSettings,
)
from twla_jax.errors import TwlaError
from twla_jax.models.io import readers
from twla_jax.models.layers import replace
from twla_jax.models.sites import set_activation_bits
from twla_jax.quantization import pipeline
from twla_jax.refinement import clip_training, descent, end_to_end, two_plane_latents
from twla_jax.refinement.latents import _straight_through, _StraightThrough, harden, init_latents
from twla_jax.refinement.schedule import rates_at
from twla_jax.refinement_settings import ClipTrainingSettings, EndToEndSettings
from twla_jax.storage import resume

from helpers import tiny
from helpers.clips import with_clips
from helpers.compiled import compiled_programs
from helpers.tiny import RECIPE

REFINE = EndToEndSettings(batch=4, code_rate=1e-2, scale_rate=5e-3, dtype="float32")
WINDOWS = np.random.default_rng(0).integers(0, 97, (24, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def teacher(tiny_model):
    return jax.tree.map(jnp.asarray, tiny_model)


@pytest.fixture(scope="module")
def student(tiny_quantized):
    return jax.tree.map(jnp.asarray, set_activation_bits(tiny_quantized[0], 4))


def kl(student, teacher, windows):
    """Written out in float64 from the models' logits."""
    p, q = (
        np.asarray(jax.nn.log_softmax(tiny.logits(model, windows)), np.float64)
        for model in (teacher, twla_jax.set_activation_bits(student, 16))
    )
    return (np.exp(p) * (p - q)).sum(-1).mean()


def flips(*models):
    """The share of codes that differ, of all planes, code by code: two bits each."""

    def codes(model, name, part):
        tensor = getattr(model.blocks, name).kernel.get_value()
        packed = getattr(tensor, part)
        return None if packed is None else np.asarray(packed)[..., None] >> np.arange(0, 8, 2) & 3

    changed = total = 0
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        for part in ("codes", "residual_codes"):
            old, new = (codes(model, name, part) for model in models)
            if old is not None:
                changed += (old != new).sum()
                total += np.prod(getattr(models[0].blocks, name).kernel.get_value().shape)
    return changed / total


def test_latents_start_as_the_student_itself(student, teacher):
    latents = init_latents(student, teacher)
    loss = end_to_end.kl_divergence(
        jax.tree.map(jnp.asarray, student), teacher, latents, jnp.asarray(WINDOWS[:3])
    )
    assert float(loss) == pytest.approx(kl(student, teacher, WINDOWS[:3]), rel=1e-4)


def test_a_symmetric_plane_stays_one_whatever_is_learned(student, teacher):
    changes = {
        f"blocks.{name}.kernel": dataclasses.replace(
            kernel, mu=np.zeros_like(kernel.mu) if name == "v" else None
        )
        for name in ("q", "k", "v", "o", "gate", "up", "down")
        for kernel in [getattr(student.blocks, name).kernel.get_value()]
    }
    symmetric = replace(student, changes)  # v as earlier versions stored it
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype),
        init_latents(symmetric, teacher),
    )
    hardened = harden(symmetric, moved, 16)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        before, after = (getattr(model.blocks, name).kernel.get_value() for model in (symmetric, hardened))
        assert after.mu is None or (name == "v" and not np.asarray(after.mu).any())
        assert (np.asarray(after.alpha) != np.asarray(before.alpha)).any()


def test_slope_is_that_of_the_divergence_written_out(student, teacher):
    latents = init_latents(student, teacher)
    placed, tokens = jax.tree.map(jnp.asarray, student), jnp.asarray(WINDOWS[:3])

    def written_out(latents):
        p = jax.nn.log_softmax(teacher(tokens))
        q = jax.nn.log_softmax(placed.logits(end_to_end._hidden(placed, latents, tokens, 16)))
        return (jnp.exp(p) * (p - q)).sum(-1).mean()

    slope = jax.grad(lambda latents: end_to_end.kl_divergence(placed, teacher, latents, tokens))
    found, expected = (jax.jit(each)(latents) for each in (slope, jax.grad(written_out)))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-7)


def test_gradients_pass_the_rounding_straight_within_reach():
    u = jnp.array([-2.0, -1.2, -0.3, 0.0, 0.7, 1.4, 1.6])
    slope = jax.grad(lambda u: (_straight_through(u) * jnp.arange(7.0)).sum())(u)
    np.testing.assert_array_equal(_straight_through(u), [-1, -1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(slope, [0, 1, 2, 3, 4, 5, 0])


def test_refined_model_is_nearer_and_has_the_same_format(student, teacher):
    refined, figures = end_to_end.refine(student, teacher, np.tile(WINDOWS, (8, 1)), REFINE, progress=False)
    assert kl(refined, teacher, WINDOWS) < 0.8 * kl(student, teacher, WINDOWS)
    assert figures["steps"] == 48
    assert figures["loss"][1] < figures["loss"][0]
    assert 0 < figures["flipped"] < 0.5
    assert figures["flipped"] == pytest.approx(flips(student, refined))
    assert jax.tree.structure(refined) == jax.tree.structure(student)
    for before, after in zip(jax.tree.leaves(student), jax.tree.leaves(refined), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_a_share_of_the_windows_is_the_teachers_own_text(student, teacher, monkeypatch):
    asked, seen = [], []
    monkeypatch.setattr(
        end_to_end.self_sampling,
        "continue_windows",
        lambda model, windows, **_: (asked.append((model, windows)), windows + 1)[1],
    )
    monkeypatch.setattr(
        end_to_end, "descend", lambda original, training, batches, *_, **__: seen.append(batches)
    )
    end_to_end.refine(student, teacher, WINDOWS, dataclasses.replace(REFINE, own_text=0.25), progress=False)
    ((model, windows),), (batches,) = asked, seen
    assert model is teacher
    changed = (batches.reshape(WINDOWS.shape) != WINDOWS).all(-1)
    assert changed.sum() == len(windows) == 6
    np.testing.assert_array_equal(windows, WINDOWS[changed])


def test_a_refinement_that_does_harm_is_not_kept(student, teacher, caplog):
    wild = dataclasses.replace(REFINE, code_rate=1.0, scale_rate=1.0)
    result, figures = end_to_end.refine(student, teacher, WINDOWS, wild, progress=False)
    assert not figures["kept"]
    assert not figures["first_batch"][1] <= figures["first_batch"][0]
    assert "left as it was" in caplog.text
    for before, after in zip(jax.tree.leaves(student), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_first_batch_is_measured_before_and_after(student, teacher):
    refined, figures = end_to_end.refine(student, teacher, np.tile(WINDOWS, (8, 1)), REFINE, progress=False)
    for model, measured in zip((student, refined), figures["first_batch"], strict=True):
        # What is stored after that is rounded to float16.
        assert measured == pytest.approx(kl(model, teacher, WINDOWS[:4]), rel=1e-2)
    assert figures["kept"]
    assert figures["first_batch"][1] < 0.95 * figures["first_batch"][0]


@pytest.mark.parametrize("steps", [1, 2, 10, 480])
def test_rates_rise_to_their_peaks_and_fall_to_nothing(steps):
    rates = [rates_at(REFINE, step, steps) for step in range(steps)]
    codes = np.array([rate["codes"] for rate in rates])
    top = codes.argmax()
    assert codes[top] == REFINE.code_rate
    assert (np.diff(codes[: top + 1]) > 0).all()
    assert (np.diff(codes[top:]) <= 0).all()
    assert (codes > 0).all()
    np.testing.assert_allclose(
        [rate["scales"] for rate in rates], codes * REFINE.scale_rate / REFINE.code_rate
    )


def test_rates_stay_at_their_peak_until_the_cooldown():
    settings = dataclasses.replace(REFINE, cooldown=0.25)
    codes = [rates_at(settings, step, 100)["codes"] for step in range(100)]
    assert codes[9:76] == [REFINE.code_rate] * 67
    assert codes[75:] == sorted(codes[75:], reverse=True)
    assert codes[-1] < 0.01 * REFINE.code_rate
    level = dataclasses.replace(REFINE, cooldown=0)
    assert rates_at(level, 99, 100)["codes"] == REFINE.code_rate


def test_where_codes_do_not_learn_scales_alone_do(student, teacher):
    settings = dataclasses.replace(REFINE, code_rate=0.0, scale_rate=1e-2)
    model, figures = end_to_end.refine(student, teacher, WINDOWS, settings, progress=False)
    assert figures["kept"]
    assert figures["flipped"] == 0
    assert figures["first_batch"][1] < figures["first_batch"][0]
    for name in ("q", "down"):
        before, after = (getattr(each.blocks, name).kernel.get_value() for each in (student, model))
        np.testing.assert_array_equal(before.codes, after.codes)
        assert not np.array_equal(before.alpha, after.alpha)


def test_other_rates_and_lengths_compile_nothing_anew(student, teacher):
    end_to_end.refine(student, teacher, WINDOWS[:8], REFINE, progress=False)
    compiled = compiled_programs(end_to_end._step)
    other = dataclasses.replace(REFINE, code_rate=1e-3, scale_rate=1e-3)
    end_to_end.refine(student, teacher, WINDOWS[:16], other, progress=False)
    assert compiled_programs(end_to_end._step) == compiled > 0


def test_fewer_windows_than_a_batch_are_refused(student, teacher):
    with pytest.raises(TwlaError, match="at least one batch of 4 windows, not 3"):
        end_to_end.refine(student, teacher, WINDOWS[:3], REFINE, progress=False)


def test_rotations_learn_on_the_manifold(student, teacher):
    def factors(model):
        transforms = (model.blocks.transform(site).rotation.get_value() for site in model.sites)
        return [np.asarray(side, np.float32) for t in transforms for side in (t.left, t.right)]

    before = factors(student)
    for rate in (0.0, 1e-2):
        recipe = dataclasses.replace(REFINE, rotation_rate=rate)
        after = factors(end_to_end.refine(student, teacher, WINDOWS[:8], recipe, progress=False)[0])
        for old, new in zip(before, after, strict=True):
            assert (np.abs(new - old).max() > 1e-3) == (rate > 0)
            product = np.swapaxes(new, -1, -2) @ new
            np.testing.assert_allclose(product, np.broadcast_to(np.eye(new.shape[-1]), new.shape), atol=3e-3)


def test_an_interrupted_refinement_goes_on_to_the_same_result(student, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "_SNAPSHOT_SECONDS", 0)
    settings = dataclasses.replace(REFINE, code_optimizer="muon")
    whole, figures = end_to_end.refine(student, teacher, WINDOWS, settings, progress=False)
    save, taken = resume.WorkDir.save, []

    def interrupted(self, name, arrays):
        save(self, name, arrays)
        taken.append(len(arrays["losses"]))
        if taken == [1, 2, 3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume.WorkDir, "save", interrupted)
    arguments = (student, teacher, WINDOWS, settings)
    with pytest.raises(KeyboardInterrupt):
        end_to_end.refine(*arguments, work_dir=tmp_path / "work", progress=False)
    resumed, again = end_to_end.refine(*arguments, work_dir=tmp_path / "work", progress=False)
    assert taken == [1, 2, 3, 4, 5, 6]
    assert again == figures
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_state_after_the_last_step_is_kept(student, teacher, tmp_path, monkeypatch):
    """What follows a refinement takes its time, too: killed there, no step is made again."""
    save, taken = resume.WorkDir.save, []

    def counted(self, name, arrays):
        save(self, name, arrays)
        taken.append(len(arrays["losses"]))

    monkeypatch.setattr(resume.WorkDir, "save", counted)
    arguments = (student, teacher, WINDOWS, REFINE)
    figures = [end_to_end.refine(*arguments, work_dir=tmp_path / "work", progress=False)[1] for _ in range(2)]
    assert figures[0] == figures[1]
    assert taken == [6]


@pytest.mark.slow
def test_a_real_model_gets_most_of_its_language_back(stories):
    """stories260K on its own stories: refinement takes at least half of what quantisation cost."""
    model = readers.load_model(stories)
    start = np.ones((104, 1), np.int32)
    text = twla_jax.generate(model, start, max_new_tokens=95, temperature=1.0, eos_token_ids=())
    windows = np.concatenate([start, text], axis=1)
    student, _ = pipeline.quantize_blocks(model, windows[:8], RECIPE.quantization, progress=False)
    refined, _ = end_to_end.refine(student, model, np.tile(windows[:96], (4, 1)), REFINE, progress=False)

    def nll(model):
        model = twla_jax.set_activation_bits(model, 16)
        return twla_jax.evaluate(model, windows[96:], progress=False)["nll"]

    full = twla_jax.evaluate(model, windows[96:], progress=False)["nll"]
    assert nll(refined) - full < 0.5 * (nll(student) - full)


@pytest.mark.slow
def test_two_planes_are_refined_through_one_latent_over_nine_levels(teacher):
    weights = dataclasses.replace(RECIPE.weights, quantizer=TwoPlaneSettings(euclidean_steps=5, rounds=1))
    student, _ = pipeline.quantize_blocks(
        teacher, tiny.WINDOWS, dataclasses.replace(RECIPE, weights=weights).quantization, progress=False
    )
    settings = dataclasses.replace(REFINE, code_rate=3e-3, scale_rate=2e-3)
    refined, figures = end_to_end.refine(student, teacher, np.tile(WINDOWS, (4, 1)), settings, progress=False)
    assert figures["first_batch"][0] == pytest.approx(kl(student, teacher, WINDOWS[:4]), rel=1e-3)
    assert kl(refined, teacher, WINDOWS) < 0.8 * kl(student, teacher, WINDOWS)
    assert 0 < figures["flipped"] < 0.2
    assert figures["flipped"] == pytest.approx(flips(student, refined))
    for before, after in zip(jax.tree.leaves(student), jax.tree.leaves(refined), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_latents_of_two_planes_stand_for_the_codes_they_start_from():
    rng = np.random.default_rng(0)
    codes, alpha = rng.integers(-4, 5, (30, 24)), rng.uniform(0.5, 1, (30, 2))
    scales = (alpha, alpha * rng.uniform(0, 1, (30, 2)), rng.normal(size=(30, 2)))
    scales = tuple(jnp.asarray(p, jnp.float32) for p in scales)
    levels = quantizers.quantizer(WeightSettings(quantizer=TwoPlaneSettings()))
    tensor = levels.pack(jnp.asarray(codes, jnp.float32), scales, 16)
    rows = jnp.asarray(rng.normal(size=(30, 24)), jnp.float32)
    u = two_plane_latents.start(rows, tensor)
    stored = (tensor.alpha.astype(jnp.float32), tensor.residual_alpha), tensor.mu.astype(jnp.float32)
    dense = two_plane_latents.dense(u, tensor, *stored)
    np.testing.assert_allclose(dense, tensors.dequantize(tensor), atol=1e-5)
    # Gradients pass straight: one unit of weight for one of the latent, nothing beyond the outermost level.
    slope = jax.grad(lambda u: two_plane_latents.dense(u, tensor, *stored).sum())(jnp.where(u > 0, 9.0, u))
    unit = np.repeat(np.asarray(two_plane_latents.unit(tensor)), 16, axis=1)[:, :24]
    np.testing.assert_allclose(slope, np.where(np.asarray(u) > 0, 0, unit), rtol=1e-6)


def test_clips_that_cut_off_too_much_learn_to_be_wider(student, teacher):
    def clips(model):
        inputs = (model.blocks.transform(site).activation.get_value() for site in model.sites)
        return np.stack([quantizer.clips for quantizer in inputs]).astype(np.float32)

    narrowed = with_clips(student, 0.3)
    settings = ClipTrainingSettings(batch=4, dtype="float32", steps=18, rate=5e-2)
    trained, figures = clip_training.train_clips(narrowed, teacher, WINDOWS, settings, progress=False)
    assert figures["steps"] == 18
    assert figures["first_batch"][1] < figures["first_batch"][0]
    assert clips(trained)[..., 1].mean() > 0.35
    np.testing.assert_array_equal(clips(trained)[..., [0, 2, 3]], clips(narrowed)[..., [0, 2, 3]])
    weights = [jax.tree.leaves(nnx.state(model.blocks.q)) for model in (student, trained)]
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_a_clips_slope_is_that_of_the_quantised_value_between_two_roundings():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    quantizer = ActivationQuantizer(bits=jnp.int32(4), clips=jnp.full(4, 0.75, jnp.float16), enabled=True)

    def value(offset):
        return _StraightThrough(quantizer, offset)(x).sum()

    # With the codes held fixed, x̂ = s·(q − z) is linear in the clip; straight through, x/s moves against it, unless
    # it is cut off (and by half where it ends on the last level).
    codes, scale, zero_point = quantize_tokens(x, 15, 0.75)
    free = jnp.round(x / scale) + zero_point
    passes = jnp.where((free > 0) & (free < 15), 1, jnp.where(free == codes, 0.5, 0))
    expected = (scale * (codes - zero_point) - passes * x).sum()
    assert float(jax.grad(value)(jnp.float32(0))) == pytest.approx(float(expected), rel=1e-4)
