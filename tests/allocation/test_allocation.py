"""Bits chosen on calibration text, measured before they are kept, and put into a folder whose weights stay."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import twla_jax
from twla_jax.allocation import choice, measurement, refit, sensitivity
from twla_jax.core import activation, tensors
from twla_jax.core.settings import ActivationSettings
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import evaluate
from twla_jax.jobs import allocate_bits
from twla_jax.models import sites
from twla_jax.models.blocks import State, site_inputs
from twla_jax.recipe import AllocationSettings, CalibrationSettings, Recipe
from twla_jax.refinement_settings import EndToEndSettings, RefineSettings
from twla_jax.storage import accounting, checkpoint, folders
from twla_jax.text import recipe_windows
from twla_jax.text import windows as text_windows
from twla_jax.text.corpora import Corpus
from twla_jax.text.windows import held_out_windows, sample_windows

RECIPE = Recipe(
    name="tiny",
    activations=ActivationSettings(clips=(1.0, 0.9, 0.7), clip_tokens=100),
    calibration=CalibrationSettings(windows=4, seq_len=24),
    allocation=AllocationSettings(budget=4.0, choices=(2, 4, 8), windows=2),
)


class Letters:
    """A tokenizer whose ids are code points, less those before the space."""

    def __call__(self, text, verbose):
        return {"input_ids": [ord(letter) - 32 for letter in text]}


def corpus(split="calibration"):
    letters = np.random.default_rng(0).integers(32, 127, 2000)
    return Corpus(name="letters", split=split, text="".join(map(chr, letters)), source="here")


def drawn(recipe):
    return recipe_windows.draw(corpus(), recipe, Letters(), 2**21)


def prepared(model, recipe=RECIPE, **options):
    return measurement.prepare(model, drawn(recipe), recipe, progress=False, **options)


def weights_of(folder):
    """Bytes of every file that an allocation has no business with."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "activation" not in str(path) and path.suffix != ".json"
    }


@pytest.fixture
def saved(tiny_ternary, tmp_path, monkeypatch):
    """The small model as a folder of `twla quantize`, with a tokenizer of letters and a text on the disk."""
    monkeypatch.setattr(checkpoint, "save_tokenizer", lambda _, folder: folder.mkdir())
    text = tmp_path / "letters.txt"
    text.write_text(corpus().text)
    calibration = dataclasses.replace(RECIPE.calibration, corpus=str(text))
    recipe = dataclasses.replace(RECIPE, calibration=calibration, allocation=AllocationSettings())
    folder = tmp_path / "models" / "out"
    checkpoint.save(tiny_ternary, None, folder, recipe, {"model": "tiny"})
    load = checkpoint.load

    def with_letters(*args, **kwargs):
        model, _, info = load(*args, **kwargs)
        # To the host, as a full-precision model is read: what other tests compiled then serves here.
        return jax.tree.map(np.asarray, model), Letters(), info

    monkeypatch.setattr(checkpoint, "load", with_letters)
    return folder


def allocate(folder, **options):
    settings = dataclasses.replace(RECIPE.allocation, budget=options.pop("budget", 4.0))
    return allocate_bits.allocate_folder(folder, settings, progress=False, **options)


def test_text_for_evaluation_never_chooses_bits(tiny_ternary):
    with pytest.raises(TwlaError, match="'letters' is marked for evaluation and cannot be calibrated on"):
        twla_jax.allocate_bits(
            tiny_ternary, corpus("evaluation"), RECIPE, tokenizer=Letters(), progress=False
        )


def test_held_out_windows_avoid_those_calibrated_on_as_far_as_the_text_allows():
    tokens = np.arange(2000, dtype=np.int32)
    drawn = [CalibrationSettings(windows=10, seq_len=50, seed=seed) for seed in (0, 1)]
    seen = set()
    for settings in drawn:
        seen |= set(sample_windows(tokens, 10, 50, settings.seed).ravel().tolist())
    windows, shared = held_out_windows(tokens, drawn, 4, 30, seed=2)
    assert shared == 0
    assert not seen & set(windows.ravel().tolist())
    assert len(set(windows.ravel().tolist())) == 4 * 30
    np.testing.assert_array_equal(windows, held_out_windows(tokens, drawn, 4, 30, seed=2)[0])
    # No room at all: what is shared is said.
    assert held_out_windows(tokens[:60], drawn, 1, 55, seed=2)[1] == 1.0
    with pytest.raises(TwlaError, match="fewer than one window of 61"):
        held_out_windows(tokens[:60], drawn, 1, 61, seed=2)


def test_windows_of_the_refinement_are_not_held_out(tiny_ternary, monkeypatch):
    avoided = []

    def held_out(tokens, drawn, *args, **options):
        avoided.extend((each.windows, each.seed) for each in drawn)
        return held_out_windows(tokens, drawn, *args, **options)

    monkeypatch.setattr(text_windows, "held_out_windows", held_out)
    recipe = dataclasses.replace(RECIPE, refine=RefineSettings(end_to_end=EndToEndSettings(steps=3, batch=2)))
    prepared(tiny_ternary, recipe)
    assert avoided == [(4, 0), (6, 1)]


@pytest.mark.parametrize("kind", ["input", "block"])
def test_what_is_chosen_measures_no_worse_than_any_other(tiny_ternary, kind):
    recipe = dataclasses.replace(RECIPE, allocation=dataclasses.replace(RECIPE.allocation, site=kind))
    model, result, tables = twla_jax.allocate_bits(
        tiny_ternary, corpus(), recipe, tokenizer=Letters(), progress=False
    )
    losses = {name: result["losses"][name] for name in ("joint", "independent", "uniform")}
    assert losses[result["chosen"]] == min(losses.values())
    assert result["after"]["loss"] == min(result["clips"]["refitted"], result["clips"]["as_fitted"])
    assert result["after"]["average_bits"] <= 4.0
    measured = prepared(tiny_ternary, recipe)
    assert evaluate(model, measured.held_out, progress=False)["nll"] == pytest.approx(result["after"]["loss"])
    bits = np.stack([result["bits"][site.name] for site in model.sites], axis=-1)
    np.testing.assert_array_equal(bits, sites.input_bits(model))
    if kind == "block":
        assert (bits == bits[:, :1]).all()
    table = tables["tables"][kind]["table"]
    assert result["predicted"]["uniform"] == pytest.approx(
        measured.table.predict(np.full(len(table["costs"]), 4), 0.5)
    )


def test_the_best_measured_allocation_is_taken_whatever_was_foretold(tiny_ternary, monkeypatch):
    measured = prepared(tiny_ternary)
    uniform = np.full((3, 4), 4)

    def loss(model, *_):
        return 1.0 if np.array_equal(sites.input_bits(model), uniform) else 2.0

    monkeypatch.setattr(choice, "held_out_loss", loss)
    monkeypatch.setattr(choice, "refit_clips", lambda model, *_, **__: model)
    model, result = choice.choose(measured, progress=False)
    assert result["chosen"] == "uniform"
    np.testing.assert_array_equal(sites.input_bits(model), uniform)
    monkeypatch.setattr(choice, "held_out_loss", lambda model, *_: float("nan") if loss(model) > 1 else 9.0)
    assert choice.choose(measured, progress=False)[1]["chosen"] == "uniform"


def test_refitted_clips_are_dropped_where_they_raise_the_loss(tiny_ternary, monkeypatch):
    measured = prepared(tiny_ternary)
    bad = {site.name: np.full((3, 4), 0.01) for site in tiny_ternary.sites}
    monkeypatch.setattr(choice, "refit_clips", lambda model, *_, **__: sites.with_input_clips(model, bad))
    model, result = choice.choose(measured, progress=False)
    assert result["clips"]["kept"] == "as_fitted"
    assert result["clips"]["refitted"] > result["clips"]["as_fitted"]
    for site, clips in sites.input_clips(measured.model).items():
        np.testing.assert_array_equal(clips, sites.input_clips(model)[site])


def test_a_refitted_clip_is_the_best_for_what_reaches_its_input_and_others_stay(tiny_ternary):
    """Recomputed for the second site, whose tokens came through the first at its chosen bits and refitted clip."""
    windows, candidates = prepared(tiny_ternary).calibration, (1.0, 0.9, 0.7, 0.5)
    bits = np.tile([2, 4, 4, 6], (3, 1))
    model = sites.with_input_bits(tiny_ternary, bits)
    fitted = refit.refit_clips(model, windows, candidates, windows.size, progress=False)
    for column, site in enumerate(model.sites):
        before, after = sites.input_clips(model)[site.name], sites.input_clips(fitted)[site.name]
        others = np.asarray(activation.BIT_CHOICES) != bits[0, column]
        np.testing.assert_array_equal(before[:, others], after[:, others])
    block = jax.tree.map(lambda leaf: leaf[0], fitted.blocks)
    x = fitted.embed_tokens(windows)
    inputs, _ = site_inputs(block, State(x), fitted.context(windows.shape[1]).layer(0))
    sample = block.o_input.rotation.get_value()(inputs["o"]).reshape(-1, 42)
    rows = tensors.dequantize(block.o.kernel.get_value())
    errors = [
        float(np.square((activation.fake_quantize(sample, 4, clip) - sample) @ rows.T).sum())
        for clip in candidates
    ]
    assert sites.input_clips(fitted)["o"][0, 1] == np.float16(candidates[int(np.argmin(errors))])


def test_the_frontier_never_rises_and_says_what_was_measured(tiny_ternary, monkeypatch):
    measured = prepared(tiny_ternary)
    points = choice.frontier(measured, [8, 2, 5, 3, 4], score=lambda _: {"perplexity": 7.0})
    assert [point["budget"] for point in points] == [2, 3, 4, 5, 8]
    losses = [point["loss"] for point in points]
    assert losses == sorted(losses, reverse=True)
    assert all(point["loss"] <= min(point["losses"].values()) for point in points)
    assert all(point["average_bits"] <= point["from_budget"] <= point["budget"] for point in points)
    assert {point["perplexity"] for point in points} == {7.0}
    # Were more bits to measure worse, the cheaper allocation would be kept.
    monkeypatch.setattr(choice, "held_out_loss", lambda model, *_: float(sites.input_bits(model).mean()))
    points = choice.frontier(measured, [2, 8])
    assert [point["from_budget"] for point in points] == [2, 2]
    assert points[1]["losses"]["uniform"] == 8.0


def test_a_second_budget_measures_nothing_anew_and_starts_from_the_first_clips(saved, monkeypatch):
    first = allocate(saved)
    assert not first["allocation"]["table"]["reused"]
    monkeypatch.setattr(sensitivity, "measure", None)
    allocate(saved, budget=3.0)
    again = allocate(saved)
    assert again["allocation"]["table"]["reused"]
    for key in ("losses", "predicted", "chosen", "clips", "bits", "after"):
        assert again["allocation"][key] == first["allocation"][key]


def test_the_weights_stay_byte_for_byte_and_the_folder_stays_whole(saved):
    weights, size = weights_of(saved), accounting.account(saved)
    before = sites.input_bits(checkpoint.load(saved)[0])
    result = allocate(saved)
    assert weights_of(saved) == weights
    model, _, info = checkpoint.load(saved)
    assert not np.array_equal(sites.input_bits(model), before)
    np.testing.assert_array_equal(
        sites.input_bits(model), np.stack(list(result["allocation"]["bits"].values()), axis=-1)
    )
    assert info.recipe.allocation == RECIPE.allocation
    assert info.report["model"] == "tiny"
    assert info.report["allocation"] == json.loads(json.dumps(result["allocation"]))
    after = accounting.account(saved)
    assert after["bytes_accounted"] == after["bytes_on_disk"] > size["bytes_on_disk"]
    assert after["bits_per_weight_linear"] == size["bits_per_weight_linear"]
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_a_frontier_alone_leaves_the_bits(saved):
    before = sites.input_bits(checkpoint.load(saved)[0])
    result = allocate(saved, budget=0.0, budgets=(3.0, 8.0))
    assert result.keys() == {"frontier", "seconds"}
    model, _, info = checkpoint.load(saved)
    np.testing.assert_array_equal(sites.input_bits(model), before)
    assert info.report["frontier"] == json.loads(json.dumps(result["frontier"]))
    assert (saved / allocate_bits.TABLES).is_file()


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_failure_while_rewriting_leaves_the_old_folder(saved, monkeypatch, moment):
    model, _, info = checkpoint.load(saved)
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    changed = sites.with_input_bits(model, np.full((3, 4), 2))
    if moment == "write":
        monkeypatch.setattr(checkpoint, "_seal", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    else:
        monkeypatch.setattr(folders, "exchange", lambda *_: False)  # as where names cannot be exchanged
        rename = type(saved).rename

        def failing(path, target):
            if path.name.endswith(".tmp"):
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(type(saved), "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.revise(saved, changed, info.recipe, {}, {})
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_a_model_saved_with_its_inputs_off_gets_them_on(tiny_ternary, tmp_path):
    off = twla_jax.set_activation_bits(tiny_ternary, 16)
    checkpoint.save(off, None, tmp_path / "out", Recipe(), {})
    changed = sites.with_input_bits(checkpoint.load(tmp_path / "out")[0], np.full((3, 4), 4))
    checkpoint.revise(tmp_path / "out", changed, Recipe(), {}, {})
    model = checkpoint.load(tmp_path / "out")[0]
    np.testing.assert_array_equal(sites.input_bits(model), np.full((3, 4), 4))
    tokens = np.arange(14).reshape(2, 7)
    np.testing.assert_array_equal(model(tokens), changed(tokens))
    assert not np.array_equal(model(tokens), off(tokens))
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(changed))


def test_the_figure_is_written_and_its_format_checked(tiny_ternary, tmp_path):
    from twla_jax.reports.plotting import plot_allocation

    measured = prepared(tiny_ternary)
    _, result = choice.choose(measured, progress=False)
    plot_allocation(tmp_path / "figure.png", measured.table, result)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(TwlaError, match=r"figure\.nothing"):
        plot_allocation(tmp_path / "figure.nothing", measured.table, result)


def test_without_matplotlib_the_way_to_a_figure_is_told(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.delitem(__import__("sys").modules, "matplotlib.figure", raising=False)
    with pytest.raises(TwlaError, match=r"pip install 'twla-jax\[plot\]'"):
        allocate(saved, plot=tmp_path / "figure.png")
