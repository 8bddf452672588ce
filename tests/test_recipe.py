"""Recipes say every setting, once, and refuse what they do not know."""

import dataclasses
import json

import pytest

from twla_jax.errors import TwlaError
from twla_jax.recipe import Recipe, load_recipe, recipe_names

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_json(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_default_recipe_is_w158_g128():
    assert load_recipe("w1.58-g128") == Recipe()


def test_the_paper_recipe_holds_the_papers_settings():
    recipe = load_recipe("paper")
    assert (recipe.rotation.start, recipe.rotation.factors, recipe.rotation.retraction) == (
        "identity",
        "paper",
        "cayley",
    )
    assert (recipe.weights.metric, recipe.weights.rounds) == ("group", 0)


def test_an_unknown_name_lists_what_exists():
    with pytest.raises(TwlaError, match=r"'w2' is neither a file nor one of: .*w1\.58-g128"):
        load_recipe("w2")
    assert set(recipe_names()) >= {"demo", "paper", "w1.58-g128", "w1.58-row"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[weights]\ngroup = 128", r"unknown key 'weights.group'; known here: quantizer"),
        ("[weight]\ngroup_size = 128", r"unknown key 'weight'; known here: name, weights"),
        ("[weights]\ngroup_size = -1", r"weights.group_size = -1: must be 0"),
        ("[weights]\ngroup_size = 1.5", r"weights.group_size = 1.5: must be of type int"),
        ("[weights]\ngroup_size = true", r"weights.group_size = True: must be of type int"),
        ("[rotation]\nstart = 'zero'", r"rotation.start = 'zero': must be one of random, identity, none"),
        ("[activations]\nbits = 5", r"activations.bits = 5: must be one of"),
        ("[activations]\nclips = [0.9]", r"activations.clips = \(0.9,\): must be a list that holds 1.0"),
        ("[allocation]\nbudget = 9", r"allocation.budget = 9.0: must be between 2 and 8 bits on average"),
        ("[allocation]\nchoices = [8, 4]", r"allocation.choices = \(8, 4\): must be two or more of"),
        ("[allocation]\nsite = 'head'", r"allocation.site = 'head': must be one of input, block"),
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


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().name = "other"  # pyright: ignore[reportAttributeAccessIssue]
