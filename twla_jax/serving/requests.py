"""Defines what is asked of the engine, and what it answers."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Literal

from twla_jax.errors import TwlaError
from twla_jax.inference.sampling import Sampling
from twla_jax.limits import check_number
from twla_jax.models.arguments import checked_tokens
from twla_jax.models.config import DecoderConfig
from twla_jax.serving.rows import Told, most_ends

Reason = Literal["stop", "length", "aborted", "failed"]


class Busy(Exception):
    """There is no place for another request now.

    Attributes:
      retry_after: seconds after which to ask again; None where it is of no use.
    """

    def __init__(self, message: str, retry_after: int | None):
        super().__init__(message)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A prompt to continue.

    Attributes:
      prompt: its token ids.
      max_new_tokens: the most tokens that are added.
      sampling: how they are chosen.
      ends: tokens that end the answer; each is the last one of it.
      logprobs: whether log-probabilities are wanted.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    ends: tuple[int, ...] = ()
    logprobs: bool = False

    @property
    def filtered(self) -> bool:
        """Returns whether tokens are drawn, and a filter (top-k, top-p, min-p) leaves some out."""
        asked = self.sampling
        return asked.temperature > 0 and bool(asked.top_k or asked.top_p < 1 or asked.min_p > 0)


def check(generation: Generation, config: DecoderConfig, max_length: int) -> None:
    """Refuse what an engine cannot generate.

    Args:
      generation: what is asked.
      config: settings of the model.
      max_length: tokens of prompt and answer at most.

    Raises:
      TwlaError: the prompt is empty or outside the vocabulary, it is too long with its answer, or a setting is out of
        range or has no part here.
    """
    length = len(checked_tokens(list(generation.prompt), config, "prompt", ranks=(1,), fits=False))
    new = generation.max_new_tokens
    check_number("max_new_tokens", new)
    if length + new > max_length:
        raise TwlaError(
            f"{length} prompt tokens and {new} new ones are {length + new}, above the limit {max_length}"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        most = int(scaling.original_max_position_embeddings)
        if length <= most < length + new - 1:
            raise TwlaError(
                f"{length} prompt tokens and {new} new ones pass {most}, where LongRoPE would compute all keys anew; "
                f"ask for {most - length + 1} at most"
            )
    if not all(
        isinstance(each, numbers.Integral) and -(2**31) <= int(each) < 2**31 for each in generation.ends
    ):
        raise TwlaError(f"ends {generation.ends!r}: must be token ids")
    if len(generation.ends) > (most := most_ends(config)):
        raise TwlaError(f"ends: at most {most} tokens can end a request")
    if generation.sampling.repetition_penalty != 1:
        raise TwlaError("repetition_penalty: is not supported here")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delivery:
    """New tokens of a request.

    Attributes:
      tokens: in order.
      told: their log-probabilities, as numpy arrays, if wanted.
      reason: why the request ended, `failed` where the model's logits were not finite; None where it goes on.
    """

    tokens: list[int]
    told: Told | None
    reason: Reason | None


@dataclasses.dataclass(kw_only=True, eq=False)
class Ticket:
    """A request on its way through the engine, which alone changes it.

    Attributes:
      generation: what is asked.
      sink: takes the tokens.
      done: whether it is over, by itself or cancelled.
      made: new tokens that were delivered.
      handed: those and the ones that the device is about to make, if no end comes before.
      prefilled: tokens of a long prompt that were read.
      retried: whether its prompt is read for the second time.
      began: when it left the queue, in seconds of the monotonic clock.
    """

    generation: Generation
    sink: Callable[[Delivery], None]
    done: bool = False
    made: int = 0
    handed: int = 0
    prefilled: int = 0
    retried: bool = False
    began: float = 0.0

    @property
    def left(self) -> int:
        """Returns how many tokens the device may be asked for yet."""
        return max(0, self.generation.max_new_tokens - self.handed)
