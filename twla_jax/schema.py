"""Checks values that came from a file against a table of types and ranges, before anything is done with them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from twla_jax.errors import TwlaError

_SHOWN = 60  # characters of a wrong value in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What a value has to be: a test, and the words a message uses for it."""

    expected: str
    accepts: Callable[[Any], bool]


def integer(least: int, most: int) -> Check:
    """Accept whole numbers in `[least, most]`; neither booleans nor floats such as 2.0."""

    def accepts(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Check(expected=f"an integer from {least} to {most}", accepts=accepts)


def number(least: float, most: float, *, above: bool = False) -> Check:
    """Accept finite numbers in `[least, most]`, or in `(least, most]` if `above`."""

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        # Compared before it is converted: an integer may be too large for a float.
        return least <= value <= most and math.isfinite(value) and not (above and value == least)

    words = (
        f"a number above {least:g} and at most {most:g}" if above else f"a number from {least:g} to {most:g}"
    )
    return Check(expected=words, accepts=accepts)


def boolean() -> Check:
    """Accept true and false."""
    return Check(expected="true or false", accepts=lambda value: isinstance(value, bool))


def text(longest: int = 4096) -> Check:
    """Accept strings of at most `longest` characters."""
    return Check(expected="a text", accepts=lambda value: isinstance(value, str) and len(value) <= longest)


def one_of(*allowed: Any) -> Check:
    """Accept these values, of these very types."""

    def accepts(value: Any) -> bool:
        return any(type(value) is type(item) and value == item for item in allowed)

    return Check(expected=" or ".join(map(repr, allowed)), accepts=accepts)


def optional(check: Check) -> Check:
    """Accept null, too."""
    return Check(
        expected=f"{check.expected}, or null", accepts=lambda value: value is None or check.accepts(value)
    )


def either(*checks: Check) -> Check:
    """Accept what one of the checks accepts."""
    return Check(
        expected=" or ".join(check.expected for check in checks),
        accepts=lambda value: any(check.accepts(value) for check in checks),
    )


def sequence(check: Check, *, longest: int, shortest: int = 0) -> Check:
    """Accept lists and tuples whose every entry the check accepts."""

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and shortest <= len(value) <= longest
            and all(map(check.accepts, value))
        )

    return Check(expected=f"a list of at most {longest}, each {check.expected}", accepts=accepts)


def mapping(check: Check | None = None, *, longest: int = 10**6) -> Check:
    """Accept objects with at most `longest` entries, whose every value the check accepts."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, Mapping) or len(value) > longest:
            return False
        return check is None or all(map(check.accepts, value.values()))

    values = "" if check is None else f" of which each value is {check.expected}"
    return Check(expected=f"an object{values}", accepts=accepts)


def record(**fields: Check) -> Check:
    """Accept objects that have each of these fields, and in it what its check accepts; others are left alone."""

    def accepts(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            name in value and check.accepts(value[name]) for name, check in fields.items()
        )

    return Check(expected=f"an object with {', '.join(fields)}", accepts=accepts)


def check_values(values: Mapping[str, Any], table: Mapping[str, Check], source: str) -> None:
    """Check every value that has an entry in the table; keys that the table does not name are left alone.

    Args:
      values: what is checked, by key.
      table: the checks, by key.
      source: where the values come from, for the message.

    Raises:
      TwlaError: a value is not what its entry accepts.
    """
    for key, check in table.items():
        if key in values and not check.accepts(values[key]):
            raise TwlaError(f"{source}: {key} is {shown(values[key])}, not {check.expected}")


def shown(value: Any) -> str:
    """Return a value on one line, cut to a length that a message can hold; nested ones by their type alone."""
    if isinstance(value, Mapping | list | tuple):
        kind = "an object" if isinstance(value, Mapping) else "a list"
        return f"{kind} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "an integer of more than 40 digits"  # Python refuses to print the longest
    words = {None: "null", True: "true", False: "false"}
    printed = words[value] if value is None or isinstance(value, bool) else repr(value)
    return printed if len(printed) <= _SHOWN else f"{printed[:_SHOWN]}…"
