"""The public names of the package: each said once, found when first used, and shown by `dir`."""

import types

import pytest

import twla_jax


def test_dir_shows_the_interface_and_nothing_else():
    assert set(dir(twla_jax)) == {*twla_jax.__all__, "core", "ops"}
    assert {"Recipe", "quantize", "quantize_blocks", "__version__"} <= set(twla_jax.__all__)


@pytest.mark.parametrize("name", sorted(set(dir(twla_jax)) - {"__version__"}))
def test_every_name_resolves_to_what_it_says_and_is_documented(name):
    for _ in range(2):
        value = getattr(twla_jax, name)
        assert value.__name__.rpartition(".")[2] == name
        assert isinstance(value, types.ModuleType) == (name in ("core", "ops"))
        assert value.__doc__


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        twla_jax.quantise  # noqa: B018
