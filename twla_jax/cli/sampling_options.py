"""Defines options of the commands that generate text: how tokens are chosen, and where a text ends."""

from typing import TYPE_CHECKING, Annotated, Any

import tyro

from twla_jax.cli.options import argument, number, read_text

if TYPE_CHECKING:  # which imports JAX
    from twla_jax.inference.sampling import Sampling

Temperature = Annotated[float, number("temperature", "T")]
TopK = Annotated[int, number("top_k", "K")]
TopP = Annotated[float, number("top_p", "P")]
MinP = Annotated[float, number("min_p", "P")]
RepetitionPenalty = Annotated[float, number("repetition_penalty", "R")]
_UNSET = tyro.conf.arg(help_behavior_hint="")  # leaves the default None out of the help
OptionalTemperature = Annotated[float | None, number("temperature", "T"), _UNSET]
OptionalTopK = Annotated[int | None, number("top_k", "K"), _UNSET]
OptionalTopP = Annotated[float | None, number("top_p", "P"), _UNSET]
OptionalMinP = Annotated[float | None, number("min_p", "P"), _UNSET]
OptionalRepetitionPenalty = Annotated[float | None, number("repetition_penalty", "R"), _UNSET]
Stop = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], argument("TEXT", optional=True)]
System = Annotated[str | None, argument("TEXT", optional=True)]


def stop_texts(stop: tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts of `--stop`, even if the terminal's locale could not read them."""
    return tuple(read_text(text, "--stop") for text in stop)


def sampling_of(suggested: dict[str, Any], **options: Any) -> "Sampling":
    """Return how tokens are chosen: by the options that are given, else as the model's files suggest."""
    from twla_jax.inference.sampling import Sampling

    stated = {key: value for key, value in options.items() if value is not None}
    return Sampling(**{**suggested, **stated})
