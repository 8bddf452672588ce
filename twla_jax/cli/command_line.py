"""Reads the words of a command line that the parser does not, and makes one line of what the parser says."""

import inspect
import re
from collections.abc import Callable, Mapping

from twla_jax.cli.loudness import FLAGS


def read(arguments: list[str], commands: Mapping[str, Callable[..., None]]) -> tuple[list[str], set[str]]:
    """Return the arguments as the parser takes them, and the flags of `FLAGS` among them, by their short names.

    Values that begin with a dash (as a prompt may) are joined to their options by `=`.
    """
    short = {name: flag for flag, names in FLAGS.items() for name in names}
    flags, rest = set(), list(arguments)
    while rest and rest[0] in short:
        flags.add(short[rest.pop(0)])
    if not rest or rest[0] not in commands:
        return rest, flags
    parameters = inspect.signature(commands[rest[0]]).parameters.values()
    options = {
        f"--{each.name.replace('_', '-')}": each for each in parameters if each.kind is each.KEYWORD_ONLY
    }
    takes_value = {name for name, each in options.items() if each.annotation is not bool}
    words = [rest.pop(0)]
    while rest:
        name = rest.pop(0)
        if name in short:
            flags.add(short[name])
            continue
        if name in takes_value and rest and rest[0].startswith("-"):
            value = rest[0].partition("=")[0]
            if value not in options and value not in ("-h", "--help"):
                name = f"{name}={rest.pop(0)}"
        words.append(name)
    return words, flags


def one_line(box: str) -> str:
    """Return the parser's message without its frame, help texts and line breaks."""
    words = []
    for line in box.splitlines():
        content = line.strip("│─|-+ ").strip()
        if content.startswith(("For full helptext", "Argument helptext", "Got errors")):
            break
        title = line.startswith(("╭", "╰")) or (line[:1] == " " and line[1:2] != " ")  # the latter in ASCII
        if not title and content:
            words.append(content)
    message = " ".join(" ".join(words).split()).removeprefix("Error parsing ")
    message = re.sub(r"Expected one of \(([^)]*)\)", lambda found: _choices(found[1]), message)
    return message or "wrong command line; see twla --help"


def _choices(listed: str) -> str:
    """Return the values of an option in order: the parser lists them in any, with `None` where there is a default."""
    values = {each.strip(" '\"") for each in listed.split(",")} - {"", "None"}
    ordered = sorted(values, key=lambda each: (int(each) if each.isdecimal() else 0, each))
    return f"Expected one of ({', '.join(ordered)})"
