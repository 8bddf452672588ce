"""`twla quantize` on text of every kind, that of the model itself included."""

import json

import pytest
from jax.errors import JaxRuntimeError

from twla_jax.cli import quantize
from twla_jax.inference import self_sampling
from twla_jax.quantization import pipeline
from twla_jax.recipe import load_recipe
from twla_jax.refinement import descent, end_to_end

from helpers.commands import fails, run
from helpers.quick_recipe import QUICK

SMALL = ["--windows", "4", "--seq-len", "64", "--check-windows", "4"]
REFINED = """[refine]
end_to_end = {steps = 2, batch = 2, dtype = 'float32'}
clips = {steps = 1, batch = 2, dtype = 'float32'}
"""


def test_the_default_text_is_of_every_domain_at_hand(stories_model, texts, tmp_path, capsys, monkeypatch):
    for split, folder in (("calibration", "train"), ("evaluation", "valid")):
        words = (texts / f"{split}.txt").read_text()[:60_000]
        (tmp_path / "domains" / folder).mkdir(parents=True)
        for name in ("stories", "prose"):
            file = tmp_path / "domains" / folder / f"{name}.jsonl"
            file.write_text(json.dumps({"text": words}) + "\n")
    monkeypatch.setenv("TWLA_DATA", str(tmp_path))
    (tmp_path / "quick.toml").write_text(QUICK)
    options = ["--recipe", tmp_path / "quick.toml", "--windows", 4, "--seq-len", 64, "--check-windows", 3]
    report = json.loads(run(capsys, "quantize", stories_model, tmp_path / "out", *options, "--json").out)
    assert report["calibration"]["corpus"] == "mix"
    assert report["calibration"]["domains"] == ["prose", "stories"]
    rows = report["evaluation"]["by_domain"]["domains"]
    assert {row["name"]: row["windows"] for row in rows} == {"prose": 2, "stories": 2}
    assert all(row["kl"] > 0 for row in rows)
    assert report["evaluation"]["windows"] == 3


def test_tokens_of_the_refinement_are_steps_of_whole_batches():
    recipe = quantize._refined_on(load_recipe("w1.58-g128-refined"), 3 * 4 * 2048 + 100)
    assert recipe.refine.end_to_end.steps == 3
    assert quantize._refined_on(recipe, 1).refine.end_to_end.steps == 1
    assert quantize._refined_on(recipe, None) == recipe


def test_minutes_of_the_refinement_draw_text_for_the_steps_they_may_take():
    recipe = load_recipe("w1.58-g128-refined")
    for minutes, steps in ((0.5, 500), (2, 2000), (60, 9000)):
        settings = quantize._refined_on(recipe, None, minutes).refine.end_to_end
        assert (settings.steps, settings.minutes) == (steps, minutes)


@pytest.mark.slow
def test_a_model_is_quantised_and_its_bits_allocated_on_text_of_its_own(
    stories_model, texts, tmp_path, capsys, monkeypatch
):
    folder, recipe = tmp_path / "out", tmp_path / "quick.toml"
    recipe.write_text(QUICK + REFINED)
    options = [
        "--recipe",
        recipe,
        "--calibration",
        "self",
        "--check-corpus",
        texts / "evaluation.txt",
        *SMALL,
    ]
    command = ["quantize", stories_model, folder, *options, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(descent, "_SNAPSHOT_SECONDS", 0)
        full = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        patch.setattr(end_to_end, "harden", lambda *_: (_ for _ in ()).throw(full))
        line, status = fails(capsys, *command)
        assert status == 1
        assert "a smaller batch or streaming = true in the recipe's [refine.end_to_end]" in line
        assert f"what is finished is kept in {folder}.partial" in line
    # What is finished is not done again.
    for module, name in ((self_sampling, "_sample_batch"), (pipeline, "quantize_block")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("done twice"))
    step, steps = end_to_end._step, []
    monkeypatch.setattr(end_to_end, "_step", lambda *a, **k: steps.append(0) or step(*a, **k))
    report = json.loads(run(capsys, *command).out)
    assert len(steps) == 1 + 1 + 1  # which measure the result, train clips, and measure that
    assert report["train_clips"]["steps"] == 1
    assert report["calibration"]["source"] == "self"
    assert report["calibration"]["sampled_windows"] == 4 + 4 + 8
    assert report["calibration"]["tokens"] == 4 * 64
    assert len(report["calibration"]["sha256"]) == 64
    assert report["seconds"]["sample the model's own text"] > 0
    assert report["evaluation"]["perplexity"]["A16"] < 512  # a uniform guess
    assert not folder.with_name("out.partial").exists()
    allocate = ["allocate", folder, "--site", "block", "--budget", 5, "--choices", "4,8"]
    held_out = json.loads(run(capsys, *allocate, "--json").out)["allocation"]["held_out"]
    assert (held_out["windows"], held_out["seen_in_calibration"]) == (8, 0)
    assert held_out["source"] == "self"
    sizes = json.loads(run(capsys, "inspect", folder, "--json").out)
    assert sizes["bytes_accounted"] == sizes["bytes_on_disk"]
    line, _ = fails(capsys, *allocate, "--windows", 9)
    assert "9 windows of 64 are wanted, but the model's own text has 8" in line
