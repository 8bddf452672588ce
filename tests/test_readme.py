"""The quick start of the README runs as it is written, and every other command in the documentation exists."""

import dataclasses
import functools
import re
import shlex
import tomllib
import typing
from pathlib import Path

import pytest

from twla_jax.cli import main
from twla_jax.recipe import Recipe

README = Path(__file__).resolve().parents[1] / "README.md"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES = [README, README.with_name("CONTRIBUTING.md"), *sorted(README.parent.glob("docs/**/*.md"))]


def block(language):
    """The first code block of that language in the quick start."""
    _, quick_start = README.read_text(encoding="utf-8").split("\n## Quick start\n")
    return re.search(rf"```{language}\n(.*?)```", quick_start, re.DOTALL).group(1)


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.slow
def test_the_commands_run(stories_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line, comments=True) for line in block("bash").splitlines()]
    assert [command[:2] for command in commands] == [
        ["twla", name] for name in ("quantize", "eval", "generate", "inspect")
    ]
    for _, *arguments in commands:
        main.main([str(stories_model) if argument == HUB_ID else argument for argument in arguments])
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "bits per weight, linears" in printed


@pytest.mark.slow
def test_the_python_runs(stories_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = block("python")
    assert code.count(f'"{HUB_ID}"') == 1
    exec(compile(code.replace(f'"{HUB_ID}"', repr(str(stories_model))), str(README), "exec"), {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "smollm2-ternary-python" / "twla.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every relative link names a file that is there, and a heading that is in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {
                re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
            }
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page, monkeypatch):
    """Every command line of `twla` is accepted by its parser, and every script named is in the repository."""
    ran = []
    for name, command in main.COMMANDS.items():
        pretended = functools.wraps(command)(lambda *args, name=name, **kwargs: ran.append(name))
        monkeypatch.setitem(main.COMMANDS, name, pretended)
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ *(twla .*|python [^-].*)$", text, re.MULTILINE):
        program, *arguments = shlex.split(line, comments=True)
        if program == "twla":
            main.main(arguments)
            assert ran.pop() == arguments[0]
        else:
            assert (README.parent / arguments[0]).is_file(), line


def tables(settings):
    """Every class of settings below one, by the name of its table."""
    found = {}
    for hint in typing.get_type_hints(settings).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= {part.table: part, **tables(part)}
    return found


def test_the_page_on_recipes_has_every_setting_and_its_default():
    page = (README.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, settings in tables(Recipe).items():
        plain = {
            field.name: list(field.default) if isinstance(field.default, tuple) else field.default
            for field in dataclasses.fields(settings)
            if isinstance(field.default, int | float | str | tuple)
        }
        _, _, section = page.partition(f"### `[{name}]`\n")
        rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section.partition("\n### ")[0], re.MULTILINE)
        assert {key: tomllib.loads(f"x = {value}")["x"] for key, value in rows} == plain, name
