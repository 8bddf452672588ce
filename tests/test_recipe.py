"""Recipes say every setting, once, and refuse what they do not know."""

import dataclasses
import json

import pytest

from twla_jax.core.settings import (
    ActivationSettings,
    CompensationSettings,
    RotationSettings,
    TernarySettings,
    WeightSettings,
)
from twla_jax.errors import TwlaError
from twla_jax.recipe import AllocationSettings, Recipe, load_recipe, recipe_names
from twla_jax.refinement_settings import BlockRefinementSettings, ClipTrainingSettings, EndToEndSettings

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_json(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_default_recipe_adds_to_the_defaults_what_wants_text_enough():
    plain = {"weights": {"compensation": {"stream": 0.0, "passes": 0}}}
    assert load_recipe("w1.58-g128").updated(plain) == Recipe()


def test_the_paper_recipe_holds_the_papers_settings():
    recipe = load_recipe("paper")
    assert (recipe.rotation.start, recipe.rotation.factors, recipe.rotation.retraction) == (
        "identity",
        "paper",
        "cayley",
    )
    assert recipe.weights.quantizer == TernarySettings(metric="group", rounds=0)
    assert recipe.weights.streams == 1


def test_an_unknown_name_lists_what_exists():
    with pytest.raises(TwlaError, match=r"'w2' is neither a file nor one of: .*w1\.58-g128"):
        load_recipe("w2")
    assert set(recipe_names()) >= {"demo", "paper", "w1.58-g128", "w1.58-row"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[weights]\ngroup = 128",
            r"unknown key 'weights.group'; known here: group_size, comp",
        ),
        ("[weight]\ngroup_size = 128", r"unknown key 'weight'; known here: name, weights"),
        ("[weights]\ngroup_size = -1", r"weights.group_size = -1: must be 0"),
        ("[weights]\ngroup_size = 1.5", r"weights.group_size = 1.5: must be of type int"),
        ("[weights]\ngroup_size = true", r"weights.group_size = True: must be of type int"),
        ("[rotation]\nstart = 'zero'", r"rotation.start = 'zero': must be one of random, identity"),
        ("[activations]\nbits = 5", r"activations.bits = 5: must be one of"),
        ("[activations]\nclips = [0.9]", r"activations.clips = \(0.9,\): must be a list that holds 1.0"),
        ("[allocation]\nbudget = 9", r"allocation.budget = 9.0: must be between 2 and 8 bits on average"),
        ("[allocation]\nchoices = [8, 4]", r"allocation.choices = \(8, 4\): must be two or more of"),
        ("[allocation]\nsite = 'head'", r"allocation.site = 'head': must be one of input, block"),
        ("[weights.integer]\nthreshold = 0.7", r"unknown key 'weights.integer.threshold'; known here: bits"),
        ("[weights.two_planes]\nthreshold = 0.7", r"unknown key 'weights.two_planes.threshold'"),
        (
            "[weights]\ninteger.bits = 4\nternary.rounds = 1",
            r"weights.ternary: only one of .* may be given",
        ),
        ("[weights.ternary]\nthreshold = nan", r"weights.ternary.threshold = nan: must be above 0"),
        ("[weights.compensation]\ndamping = inf", r"weights.compensation.damping = inf: must be above 0"),
        ("weights = false", r"weights: must be a table"),
        ("[rotation]\nlearning_rate = inf", r"rotation.learning_rate = inf: must be above 0"),
        ("[refine.end_to_end]\nsteps = 0", r"refine.end_to_end.steps = 0: must be 1 or more"),
        ("[calibration]\nseed = -1", r"calibration.seed = -1: must be between 0 and"),
        ("extends = 'w2'", r"mine.toml: recipe 'w2' is neither a file nor one of"),
        (f"extends = '{'w' * 300}'", r"mine.toml: recipe 'w+' is neither a file nor one of"),
        ("extends = 3", r"extends = 3: must be the name of a recipe"),
        ("extends = 'mine.toml'", r"mine.toml: extends itself"),
        ("weights = 3", r"weights: must be a table"),
        ("[weights", r"not a TOML file"),
    ],
)
def test_a_mistake_is_one_line_naming_file_and_setting(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(TwlaError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_extends_another_says_what_differs(tmp_path):
    (tmp_path / "first.toml").write_text("extends = 'gptq-int4'\n[weights.integer]\nbits = 3\n")
    (tmp_path / "second.toml").write_text("extends = 'first.toml'\n[weights]\nternary.rounds = 1\n")
    first, second = (load_recipe(tmp_path / f"{name}.toml") for name in ("first", "second"))
    assert first == dataclasses.replace(load_recipe("gptq-int3"), name="first")
    # Another quantiser takes the place of the extended recipe's, all else of the weights stays.
    assert second.weights == dataclasses.replace(first.weights, quantizer=TernarySettings(rounds=1))
    assert (second.name, second.rotation) == ("second", None)


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (TernarySettings, {"threshold": float("nan")}),
        (TernarySettings, {"rounds": 1.5}),
        (TernarySettings, {"metric": "other"}),
        (WeightSettings, {"quantizer": "integer"}),
        (CompensationSettings, {"propagation": 1.01}),
        (ActivationSettings, {"clips": (1.0, float("nan"))}),
        (ActivationSettings, {"clips": (1.0, 1.5)}),
        (EndToEndSettings, {"code_rate": float("inf")}),
        (EndToEndSettings, {"steps": True}),
        (AllocationSettings, {"beta": float("nan")}),
        (AllocationSettings, {"budget": float("nan")}),
        (AllocationSettings, {"choices": ()}),
    ],
)
def test_python_is_held_to_the_same_ranges(settings, values):
    with pytest.raises(TwlaError, match=rf"^{settings.table}.{next(iter(values))} = .*: must be "):
        settings(**values)


def test_whole_numbers_become_floats_and_lists_tuples():
    assert repr(RotationSettings(range_weight=1).range_weight) == "1.0"
    assert ActivationSettings(clips=[1, 0.5]).clips == (1.0, 0.5)


# What version 0.1.0 wrote for `w2x1.58-g128-refined` and for `rtn-int3`, less what stayed as it was.
OLD_WEIGHTS = {
    "planes": 1,
    "bits": 4,
    "group_size": 128,
    "euclidean_steps": 15,
    "threshold": 0.75,
    "rounds": 3,
    "metric": "compensated",
    "damping": 0.01,
    "compensate": True,
    "propagation": 0.5,
}
OLD_CALIBRATION = {"windows": 128, "seq_len": 2048}
OLD_REFINE = {
    "steps": 0,
    "batch": 4,
    "code_rate": 5e-3,
    "scale_rate": 2e-3,
    "rotation_rate": 0.0,
    "activation_bits": 16,
    "dtype": "bfloat16",
    "block_steps": 0,
    "block_window": 1,
    "block_mix": 0.0,
    "clip_steps": 0,
    "clip_bits": 4,
    "clip_rate": 5e-3,
}


def old(name, rotation="random", refine=(), **weights):
    return {
        "name": name,
        "weights": {**OLD_WEIGHTS, **weights},
        "rotation": {"start": rotation, "factors": "balanced", "steps": 100},
        "embedding": {"bits": 16, "group_size": 128},
        "refine": {**OLD_REFINE, **dict(refine)},
        "calibration": OLD_CALIBRATION,
    }


def test_recipes_in_folders_of_version_0_1_0_are_read():
    two = old("w2x1.58-g128-refined", quantizer="ternary", planes=2, refine={"steps": 240})
    assert Recipe.from_dict(two) == load_recipe("w2x1.58-g128-refined")
    integer = {"quantizer": "integer", "bits": 3, "rounds": 0, "compensate": False, "propagation": 0.0}
    drawn = {"calibration": OLD_CALIBRATION}
    assert Recipe.from_dict(old("rtn-int3", "none", **integer)) == load_recipe("rtn-int3").updated(drawn)
    learning = {"block_steps": 9, "block_mix": 0.5, "clip_steps": 7, "clip_bits": 2, "batch": 3}
    refine = Recipe.from_dict(old("mine", quantizer="ternary", refine=learning)).refine
    assert refine.blocks == BlockRefinementSettings(steps=9, mix=0.5, batch=3)
    assert refine.clips == ClipTrainingSettings(steps=7, bits=2, batch=3)
    assert refine.end_to_end is None


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().name = "other"  # pyright: ignore[reportAttributeAccessIssue]
