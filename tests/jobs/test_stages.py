"""From Python, a recipe runs every stage that it names, or says which text it lacks."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import twla_jax
from twla_jax.core.settings import (
    ActivationSettings,
    FoldedRotationSettings,
    RotationSettings,
    TernarySettings,
    WeightSettings,
)
from twla_jax.core.tensors import IntegerTensor
from twla_jax.errors import TwlaError
from twla_jax.jobs import stages
from twla_jax.models.decoder import Decoder
from twla_jax.recipe import AllocationSettings, CalibrationSettings, EmbeddingSettings, Recipe
from twla_jax.refinement_settings import (
    BlockRefinementSettings,
    ClipTrainingSettings,
    EndToEndSettings,
    RefineSettings,
)
from twla_jax.reports.run import same_bytes

# As in the tests of each stage alone, so that what is compiled there serves here.
LEARNING = {"steps": 2, "batch": 4, "dtype": "float32"}
RECIPE = Recipe(
    name="all",
    weights=WeightSettings(quantizer=TernarySettings(euclidean_steps=5, rounds=1), group_size=16),
    rotation=RotationSettings(steps=5),
    activations=ActivationSettings(bits=8, clips=(1.0, 0.8), clip_tokens=64),
    embedding=EmbeddingSettings(bits=4, group_size=16),
    refine=RefineSettings(
        blocks=BlockRefinementSettings(**LEARNING),
        end_to_end=EndToEndSettings(**LEARNING),
        clips=ClipTrainingSettings(**LEARNING),
    ),
    calibration=CalibrationSettings(windows=12, seq_len=24),
    allocation=AllocationSettings(budget=4.0, choices=(4, 8), windows=2),
)
TOKENS = np.random.default_rng(0).integers(0, 97, 600).astype(np.int32)
WINDOWS = TOKENS[: 22 * 24].reshape(22, 24)


@pytest.fixture(scope="module")
def model(tiny_config):
    return Decoder(tiny_config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(model):
    return twla_jax.quantize(model, WINDOWS, RECIPE, progress=False)


def test_rotations_are_folded_in_before_any_stage(model, monkeypatch):
    seen = []

    def run_stages(stages, model, work, phases):
        seen.extend([model, work.teacher])
        return model, {}

    monkeypatch.setattr(stages, "run_stages", run_stages)
    recipe = dataclasses.replace(RECIPE, folded_rotation=FoldedRotationSettings())
    twla_jax.quantize(model, WINDOWS, recipe, progress=False)
    first, teacher = seen
    assert first is teacher
    assert (np.asarray(first.norm.scale.get_value()) == 1).all()
    forward = jax.jit(lambda model, tokens: model(tokens))
    np.testing.assert_allclose(*(forward(each, WINDOWS[:2]) for each in (first, model)), atol=1e-5)
    kernels = (each.blocks.linears(each.sites[0])[0].kernel.get_value() for each in (first, model))
    assert np.abs(np.subtract(*kernels)).max() > 0.01


def test_every_stage_of_the_recipe_runs(quantized):
    result, figures = quantized
    assert list(figures["seconds"]) == [stage.name for stage in (*stages.WEIGHT_STAGES, *stages.BIT_STAGES)]
    assert figures["refine_blocks"]["steps"] == figures["refine"]["steps"] == 2
    assert figures["train_clips"]["steps"] == 2
    assert figures["allocation"]["after"]["average_bits"] <= 4.0
    assert figures["allocation"]["held_out"]["windows"] == 2
    assert isinstance(result.embed.get_value(), IntegerTensor)


def test_each_stage_reads_windows_of_its_own(model, monkeypatch):
    work = {}

    def record(chosen, model, given, phases):
        work["text"] = given.text
        return model, {}

    monkeypatch.setattr(stages, "run_stages", record)
    twla_jax.quantize(model, WINDOWS, RECIPE, progress=False)
    np.testing.assert_array_equal(work["text"].calibration, WINDOWS[:12])
    np.testing.assert_array_equal(work["text"].refinement, WINDOWS[12:20])
    np.testing.assert_array_equal(work["text"].held_out, WINDOWS[20:])


def test_the_model_is_left_as_it_was(model, quantized):
    again = Decoder(model.config, rngs=nnx.Rngs(0))
    assert jax.tree.structure(model) == jax.tree.structure(again)
    for before, after in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert jax.tree.structure(quantized[0]) != jax.tree.structure(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            WINDOWS[:10],
            r"recipe 'all' reads 8 windows to refine on and 2 to allocate bits on, .* 10 are too few",
        ),
        (TOKENS[:11], r"11 tokens"),
        (WINDOWS.astype(np.float32), "token ids are whole numbers, not float32"),
        (WINDOWS[None], r"token ids of shape \(1, 22, 24\), but 1 or 2 axes are wanted"),
        (WINDOWS + 97, r"vocabulary"),
        (
            twla_jax.Corpus(name="a", split="calibration", text="b", source="c"),
            r"a corpus needs .* tokenizer",
        ),
    ],
)
def test_text_that_a_stage_lacks_is_one_line(model, text, message):
    with pytest.raises(TwlaError, match=message) as caught:
        twla_jax.quantize(model, text, RECIPE, progress=False)
    assert "\n" not in str(caught.value)


def test_tokens_are_drawn_from_as_the_recipe_says(model):
    plain = dataclasses.replace(RECIPE, refine=RefineSettings(), allocation=AllocationSettings())
    drawn = twla_jax.quantize(model, TOKENS, plain, progress=False)
    starts = np.random.default_rng(0).integers(0, len(TOKENS) - 23, 12)
    windows = np.stack([TOKENS[start : start + 24] for start in starts])
    given = twla_jax.quantize(model, windows, plain, progress=False)
    assert list(drawn[1]) == ["layers", "seconds"]
    for one, other in zip(jax.tree.leaves(drawn[0]), jax.tree.leaves(given[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_report_says_when_the_same_bytes_come_again():
    shared, one_order = "same versions, XLA flags and kind of device", "--xla_gpu_deterministic_ops=true"
    assert same_bytes("cpu", 1, "") == same_bytes("gpu", 1, f"--xla_a=1 {one_order}") == shared
    assert same_bytes("gpu", 1, "").startswith("not promised, as a GPU may add up in another order")
    assert same_bytes("gpu", 1, "").endswith(f"with XLA_FLAGS={one_order}: {shared}")
    assert (
        same_bytes("cpu", 4, "") == f"{shared}, on the same mesh of these 4: others add up in another order"
    )
