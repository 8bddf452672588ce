"""No command line and no recipe ends in an error that nobody foresaw: one line and an exit status, or a result."""

import inspect

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twla_jax.cli import main
from twla_jax.errors import TwlaError
from twla_jax.recipe import Recipe, load_recipe

QUIET = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
WORDS = st.one_of(
    st.sampled_from(
        ["", "-", "--", "-1", "0", "1e9", "nan", "None", ".", "..", "~", "~x", "/", "a\0b", "\udcff"]
    ),
    st.sampled_from(
        ["w1.58-g128", "pydoc", "self", "pydoc+", "4,8", "16", "float32", "input", "1" * 5000, "x" * 300]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.text(max_size=6),
)


@st.composite
def command_lines(draw):
    """A command with some of its options, each with any value; MODEL and OUT lead nowhere."""
    command = draw(
        st.sampled_from(
            ["quantize", "allocate", "eval", "generate", "inspect", "export", "report", "compare"]
        )
    )
    parameters = inspect.signature(main.COMMANDS[command]).parameters.values()
    places = [draw(WORDS) for each in parameters if each.kind is each.POSITIONAL_ONLY]
    options = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    arguments = [command, *places]
    for each in draw(st.lists(st.sampled_from(options), max_size=4, unique_by=lambda each: each.name)):
        arguments.append(f"--{each.name.replace('_', '-')}")
        if each.annotation is not bool or draw(st.booleans()):
            arguments.append(draw(WORDS))
    return arguments


@QUIET
@given(arguments=command_lines())
def test_no_command_line_ends_unexpectedly(arguments, tmp_path, monkeypatch, capsys):
    # Nothing to work on: what is tested is everything that comes before work.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    printed = capsys.readouterr()
    assert "unexpected" not in printed.err
    assert "Traceback" not in printed.err
    assert stop.value.code in (0, 1, 2)
    assert stop.value.code == 0 or printed.err.splitlines()[-1].startswith("twla: error: ")
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}  # where libraries keep caches


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(values, path=()):
    """The path of every value inside nested tables."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@QUIET
@given(data=st.data())
def test_no_recipe_ends_unexpectedly(data):
    values = load_recipe("w1.58-g128").to_dict()
    *tables, last = data.draw(st.sampled_from(list(places(values))))
    inside = values
    for table in tables:
        inside = inside[table]
    inside[last] = data.draw(VALUES)
    try:
        recipe = Recipe.from_dict(values)
    except TwlaError as error:
        assert str(error)  # noqa: PT017 - either outcome is right
        return
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    "content",
    [
        b"a." * 20_000 + b"a = 1",
        b"a = " + b"[" * 20_000,
        b"a = 1" + b"0" * 5000,
        b"\xff",
        b"weights = 5",
        b"[weights]\ngroup_size = 4611686018427387904",
        b"[calibration]\nseed = -1",
        b"name = 5",
        b"extends = '../../etc/passwd'",
    ],
)
def test_a_recipe_file_of_any_kind_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(TwlaError) as caught:
        load_recipe(tmp_path / "mine.toml")
    assert len(str(caught.value)) < 1000
