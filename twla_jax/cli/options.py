"""Defines option types, recipe overrides and printing that the commands share."""

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from twla_jax import json_text
from twla_jax.errors import TwlaError
from twla_jax.limits import LIMITS, check_number

if TYPE_CHECKING:  # which imports JAX
    from jax.sharding import Mesh

    from twla_jax.recipe import Recipe

Bits = Literal[16, 8, 6, 4, 2]
Dtype = Literal["float32", "bfloat16", "float16"]
Kernels = Literal["auto", "on", "off"]
Site = Literal["input", "block"]


def argument(metavar: str, *, optional: bool = False) -> Any:
    """Return the setting that names an option's value in the help; `optional` leaves the default None out."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="" if optional else None)


def number(name: str, metavar: str = "N") -> Any:
    """Return the setting that reads a number and refuses one outside the range that `LIMITS` has for its name."""
    limit = LIMITS[name]

    def read(words: list[str]) -> Any:
        with contextlib.suppress(ValueError):
            if limit.accepts(value := limit.kind(words[0])):
                return value
        raise ValueError(f"{words[0][:40]!r} is not {limit.words}")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: value is None or limit.accepts(value),
        str_from_instance=lambda value: [str(value)],
    )


# Any text, also the word None, which the parser takes for no text at all where there may be none.
_ANY_TEXT = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="TEXT",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [str(value)],
)

Model = Annotated[tyro.conf.Positional[str], argument("MODEL")]
Out = Annotated[tyro.conf.Positional[str], argument("OUT")]
Seed = Annotated[int, number("seed")]
SeqLen = Annotated[int, number("seq_len")]
BatchSize = Annotated[int, number("batch_size")]
CheckWindows = Annotated[int, number("check_windows")]
_UNSET = tyro.conf.arg(help_behavior_hint="")  # leaves the default None out of the help
OptionalSeed = Annotated[int | None, number("seed"), _UNSET]
OptionalSeqLen = Annotated[int | None, number("seq_len"), _UNSET]
OptionalWindows = Annotated[int | None, number("windows"), _UNSET]
OptionalMaxWindows = Annotated[int | None, number("max_windows"), _UNSET]
OptionalLimit = Annotated[int | None, number("limit"), _UNSET]
OptionalLayers = Annotated[int | None, number("layers"), _UNSET]
OptionalEmbeddingBits = Annotated[int | None, number("embedding_bits", "{2,…,8,16}"), _UNSET]
OptionalRefineTokens = Annotated[int | None, number("refine_tokens"), _UNSET]
OptionalMinutes = Annotated[float | None, number("minutes", "N"), _UNSET]
OptionalBudget = Annotated[float | None, number("budget", "BITS"), _UNSET]
OptionalBits = Annotated[Bits | None, argument("{16,8,6,4,2}", optional=True)]
OptionalSite = Annotated[Site | None, argument("{input,block}", optional=True)]
OptionalDtype = Annotated[Dtype | None, argument("{float32,bfloat16,float16}", optional=True)]
OptionalFile = Annotated[str | None, argument("FILE", optional=True)]
OptionalMesh = Annotated[str | None, argument("data=N,model=N", optional=True)]
OptionalHosts = Annotated[str | None, argument("auto|HOST:PORT,N,I", optional=True)]
OptionalText = Annotated[str | None, _ANY_TEXT, _UNSET]
OptionalCorpus = Annotated[str | None, argument("CORPUS", optional=True)]


def with_options(
    recipe: "Recipe",
    corpus: str | None,
    windows: int | None,
    seq_len: int | None,
    activation_bits: int | None,
    seed: int | None,
) -> "Recipe":
    """Return the recipe with the settings that the command line gives in place of its own."""
    changes = {
        "calibration": given(corpus=corpus, windows=windows, seq_len=seq_len, seed=seed),
        "activations": given(bits=activation_bits),
    }
    if recipe.rotation is not None:
        changes["rotation"] = given(seed=seed)
    if recipe.folded_rotation is not None:
        changes["folded_rotation"] = given(seed=seed)
    return recipe.updated(changes)


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {key: value for key, value in options.items() if value is not None}


def numbers(text: str, kind: Callable[[str], Any], option: str, name: str = "") -> tuple[Any, ...]:
    """Return the numbers in the comma-separated `text`.

    Raises:
      TwlaError: `text` holds something else; the message names `option`.
    """
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise TwlaError(f"{option} {text[:80]}: must be numbers with commas between them") from None
    for value in values if name else ():
        check_number(name, value, called=option)
    return values


def read_text(text: str, option: str) -> str:
    """Return the text of an option, even if the terminal's locale could not read it.

    Raises:
      TwlaError: it is not UTF-8; the message names `option`.
    """
    try:
        return os.fsencode(text).decode() if any("\udc80" <= letter <= "\udcff" for letter in text) else text
    except UnicodeError:
        raise TwlaError(f"{option}: not UTF-8 text") from None


def mesh_of(text: str | None) -> "Mesh | None":
    """Return the mesh that an option names, or None."""
    from twla_jax.models import sharding

    return None if text is None else sharding.make_mesh(text)


def join_hosts(coordinator: str | None, mesh: str | None, beside: dict[str, Any]) -> None:
    """Join other hosts, if they are named.

    Args:
      coordinator: how the hosts find one another; None stays alone.
      mesh: how their devices are used.
      beside: by name, what one host alone can do, and None where it is not asked for.

    Raises:
      TwlaError: there is no mesh, something is asked for that one host alone can do, or the others are not reached.
    """
    from twla_jax import hosts

    if coordinator is None:
        return
    if mesh is None:
        raise TwlaError("--coordinator needs --mesh, which says how the devices of all hosts are used")
    for option, value in beside.items():
        if value is not None:
            raise TwlaError(f"{option} runs on one host; leave out --coordinator")
    hosts.join(coordinator)


def show(figures: dict[str, Any], as_json: bool, text: Callable[[], str]) -> None:
    """Print figures on stdout, as JSON or as lines of text."""
    print(json_text.dumps(figures).rstrip() if as_json else text())
