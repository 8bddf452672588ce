"""Checks frozen settings when they are made, and turns them into plain values for TOML and JSON and back."""

import dataclasses
import functools
import numbers
import sys
import types
import typing
from typing import Any, ClassVar, Literal, Self

from twla_jax.errors import TwlaError

_LARGEST = 2**31  # what every array and compiler takes; no setting comes near


def ranged(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    one_of: tuple[Any, ...] | None = None,
    wanted: str = "",
) -> Any:
    """Return a dataclass field whose value, or each item of it, must lie in a range.

    Args:
      default: the field's default.
      low: the least value allowed.
      above: a bound that values must exceed.
      high: the greatest value allowed.
      one_of: the only values allowed.
      wanted: what an error says is wanted, where the bounds alone do not say it well.
    """
    allowed = {"low": low, "above": above, "high": high, "one_of": one_of}
    return dataclasses.field(default=default, metadata={**allowed, "wanted": wanted or _in_words(**allowed)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one stage; every value is checked when an instance is made, from Python or from a file.

    Types are those of the annotations, numbers must be finite and in the range of their field (see `ranged`). Whole
    numbers become floats and lists become tuples where the annotation says so; nothing else is converted.
    """

    table: ClassVar[str] = ""  # where errors and recipe files place these settings, such as `weights.ternary`

    def __post_init__(self):
        for field in dataclasses.fields(self):
            hint, value = _hints(type(self))[field.name], getattr(self, field.name)
            value = _checked(hint, value, self.key(field.name), field.metadata)
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Refuse values that do not go together.

        Raises:
          TwlaError: they do not.
        """

    @classmethod
    def key(cls, name: str) -> str:
        """Return a setting's name as recipe files and errors have it, such as `weights.group_size`."""
        return f"{cls.table}.{name}" if cls.table else name

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in nested dicts, ready for JSON; `from_dict` is its inverse.

        Where a field may hold one of several kinds of settings, the kind is the key. None is written as false.
        """
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            union = len(_kinds(type(self), field.name)) > 1
            if isinstance(value, Settings):
                values[_tag(type(value)) if union else field.name] = value.to_dict()
            else:
                plain = list(value) if isinstance(value, tuple) else value
                values[field.name] = False if value is None else plain
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the settings that nested dicts say; what is left out takes its default.

        Raises:
          TwlaError: an unknown key, a value of the wrong type or out of range.
        """
        return _build(cls, values, None)

    def updated(self, values: dict[str, Any]) -> Self:
        """Return these settings with what nested dicts say in place of their own.

        A table of the kind that is there already changes it; a table of another kind replaces it, from its defaults.

        Raises:
          TwlaError: as `from_dict`.
        """
        return _build(type(self), values, self)


def require(condition: bool, key: str, value: Any, wanted: str) -> None:
    """Refuse a setting.

    Raises:
      TwlaError: the condition is false; says the key, the value and what is wanted.
    """
    if not condition:
        # Python refuses to print the longest whole numbers.
        endless = isinstance(value, int) and abs(value) > 10**40
        raise TwlaError(
            f"{key} = {'a number of over 40 digits' if endless else repr(value)}: must be {wanted}"
        )


def _in_words(low, above, high, one_of) -> str:
    if one_of is not None:
        return f"one of {', '.join(map(str, one_of))}"
    if low is not None:
        return f"{low} or more" if high is None else f"between {low} and {high}"
    return f"above {above}" + ("" if high is None else f" and at most {high}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _kinds(cls: type, name: str) -> tuple[type[Settings], ...]:
    """Return the kinds of settings that a field may hold; none for plain values."""
    hint = _hints(cls)[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings))


def _tag(cls: type[Settings]) -> str:
    return cls.table.rpartition(".")[2]


def _checked(hint: Any, value: Any, key: str, allowed: Any) -> Any:
    """Return `value` as its annotation has it: whole numbers as floats, lists as tuples."""
    if isinstance(hint, types.UnionType) or (isinstance(hint, type) and issubclass(hint, Settings)):
        kinds = typing.cast(tuple[type, ...], typing.get_args(hint) or (hint,))
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        require(isinstance(value, kinds), key, value, names)
        return value
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        require(value in choices, key, value, f"one of {', '.join(choices)}")
        return value
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), key, value, "a list")
        items = (_checked(typing.get_args(hint)[0], item, key, {}) for item in value)
        value = tuple(items)
        require(all(_within(item, allowed) for item in value), key, value, allowed.get("wanted", ""))
        return value
    accepted = {float: numbers.Real, int: numbers.Integral}.get(hint, hint)
    right = isinstance(value, accepted) and isinstance(value, bool) == (hint is bool)
    require(right, key, value, f"of type {hint.__name__}")
    bounded = hint is not int or allowed.get("high") is not None  # a seed may be larger than any size
    require(bounded or abs(value) < _LARGEST, key, value, f"below {_LARGEST}")
    finite = hint is not float or abs(value) <= sys.float_info.max  # false for NaN
    require(finite and _within(value, allowed), key, value, allowed.get("wanted") or "finite")
    return hint(value)


def _within(value: Any, allowed: Any) -> bool:
    return (
        (allowed.get("one_of") is None or value in allowed["one_of"])
        and (allowed.get("low") is None or value >= allowed["low"])
        and (allowed.get("above") is None or value > allowed["above"])
        and (allowed.get("high") is None or value <= allowed["high"])
    )


def _build(cls: Any, values: Any, base: Any) -> Any:
    """Return settings of class `cls` from nested dicts, what is left out from `base`, or from defaults without one."""
    if not isinstance(values, dict):
        raise TwlaError(f"{cls.table}: must be a table")
    kinds = {field.name: _kinds(cls, field.name) for field in dataclasses.fields(cls)}
    tags = {_tag(kind): (name, kind) for name, some in kinds.items() if len(some) > 1 for kind in some}
    known = [name for name, some in kinds.items() if len(some) < 2] + list(tags)
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise TwlaError(f"unknown key '{cls.key(key)}'; known here: {', '.join(known)}")
        name, kind = tags.get(key) or (key, next(iter(kinds[key]), None))
        if name in given:
            others = ", ".join(tag for tag, (of, _) in tags.items() if of == name)
            raise TwlaError(f"{cls.key(key)}: only one of {others} may be given")
        if kind is None:
            given[name] = value
        elif value is False and type(None) in typing.get_args(_hints(cls)[name]):
            given[name] = None
        else:
            held = getattr(base, name, None)
            given[name] = _build(kind, value, held if isinstance(held, kind) else None)
    return cls(**given) if base is None else dataclasses.replace(base, **given)
