"""Option types, recipe overrides and printing that the commands share."""

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


def argument(metavar: str, *, optional: bool = False) -> Any:
    """Return the setting that names an option's value in the help; `optional` leaves the default None out."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="" if optional else None)


Model = Annotated[tyro.conf.Positional[str], argument("MODEL")]
Out = Annotated[tyro.conf.Positional[str], argument("OUT")]
OptionalInt = Annotated[int | None, argument("N", optional=True)]
OptionalBudget = Annotated[float | None, argument("BITS", optional=True)]
OptionalBits = Annotated[Bits | None, argument("{16,8,6,4,2}", optional=True)]
OptionalSite = Annotated[Site | None, argument("{input,block}", optional=True)]
OptionalDtype = Annotated[Dtype | None, argument("{float32,bfloat16,float16}", optional=True)]
OptionalFile = Annotated[str | None, argument("FILE", optional=True)]
OptionalCorpus = Annotated[str | None, argument("CORPUS", optional=True)]


def with_options(
    recipe: recipes.Recipe,
    corpus: str | None,
    windows: int | None,
    seq_len: int | None,
    activation_bits: int | None,
    seed: int | None,
) -> recipes.Recipe:
    """Return the recipe with the settings that the command line gives in place of its own."""
    return dataclasses.replace(
        recipe,
        calibration=changed(recipe.calibration, corpus=corpus, windows=windows, seq_len=seq_len, seed=seed),
        activations=changed(recipe.activations, bits=activation_bits),
        rotation=changed(recipe.rotation, seed=seed),
    )


def changed(part: Any, **options: Any) -> Any:
    """Return a part of a recipe, changed by the options that are not None."""
    return dataclasses.replace(part, **{key: value for key, value in options.items() if value is not None})


def numbers(text: str, kind: Callable[[str], Any], option: str) -> tuple[Any, ...]:
    """Return the numbers in the comma-separated `text`.

    Raises:
      TwlaError: `text` holds something else; the message names `option`.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise TwlaError(f"{option} {text}: must be numbers with commas between them") from None


def show(figures: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """Print figures on stdout, as JSON or as lines of text."""
    print(json.dumps(figures, indent=1) if as_json else text())
