"""What the commands share: the types of their options, recipes changed by them, and how figures are printed."""

import dataclasses
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro

from twla_jax import recipe as recipes
from twla_jax.errors import TwlaError

Bits = Literal[16, 8, 6, 4, 2]
Dtype = Literal["float32", "bfloat16", "float16"]
Kernels = Literal["auto", "on", "off"]
Site = Literal["input", "block"]


def argument(metavar: str) -> Any:
    """How an option's value is called in the help."""
    return tyro.conf.arg(metavar=metavar)


Model = Annotated[tyro.conf.Positional[str], argument("MODEL")]
Out = Annotated[tyro.conf.Positional[str], argument("OUT")]
OptionalInt = Annotated[int | None, argument("N")]
OptionalBudget = Annotated[float | None, argument("BITS")]
OptionalBits = Annotated[Bits | None, argument("{16,8,6,4,2}")]


def with_options(
    recipe: recipes.Recipe,
    corpus: str | None,
    windows: int | None,
    seq_len: int | None,
    activation_bits: int | None,
    seed: int | None,
) -> recipes.Recipe:
    """A recipe with what the command line says in place of its own settings."""
    return dataclasses.replace(
        recipe,
        calibration=changed(recipe.calibration, corpus=corpus, windows=windows, seq_len=seq_len, seed=seed),
        activations=changed(recipe.activations, bits=activation_bits),
        rotation=changed(recipe.rotation, seed=seed),
    )


def changed(part: Any, **options: Any) -> Any:
    """A part of a recipe with those options that were given."""
    return dataclasses.replace(part, **{key: value for key, value in options.items() if value is not None})


def numbers(text: str, kind: Callable[[str], Any], option: str) -> tuple[Any, ...]:
    """The numbers in `text`, with commas between them.

    Raises:
      TwlaError: something else; names `option`.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise TwlaError(f"{option} {text}: must be numbers with commas between them") from None


def show(figures: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """Prints figures on stdout: as JSON, or as lines for a person."""
    print(json.dumps(figures, indent=1) if as_json else text())
