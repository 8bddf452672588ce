"""Gives the ranges of the numbers that commands and public functions take, in one place."""

import dataclasses
import math
import numbers
from typing import Any

from twla_jax.errors import TwlaError

SEED_LIMIT = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """A range of numbers, both ends allowed.

    Attributes:
      kind: int for whole numbers alone, float for any finite number.
      low: the least value.
      high: the greatest value: far beyond any use, so that a slip of the keys is not taken for a day's work.
      choices: the only values, where these are few.
    """

    kind: type = int
    low: float = 1
    high: float = math.inf
    choices: tuple[int, ...] = ()

    @property
    def words(self) -> str:
        """Return what a message says is wanted."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return (
            f"{'a whole number' if self.kind is int else 'a number'} from {self.low:.12g} to {self.high:.12g}"
        )

    def accepts(self, value: Any) -> bool:
        """Return whether a value is a number of this kind within the range; booleans are none."""
        wanted = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, wanted):
            return False
        if self.choices:
            return value in self.choices
        # Compared before anything is converted: a whole number may be too large for a float.
        number: Any = value
        return bool(self.low <= number <= self.high and (self.kind is int or math.isfinite(number)))


LIMITS = {
    "activation_bits": Limit(choices=(16, 8, 6, 4, 2)),
    "budget": Limit(kind=float, low=1, high=16),
    "embedding_bits": Limit(choices=(2, 3, 4, 5, 6, 7, 8, 16)),
    "batch": Limit(high=65_536),
    "batch_size": Limit(high=65_536),
    "beta": Limit(kind=float, low=0, high=1e6),
    "check_windows": Limit(high=10**9),
    "chunk": Limit(high=2**20),
    "context": Limit(low=0, high=2**24),
    "grace": Limit(low=0, high=86_400),
    "layers": Limit(high=4096),
    "limit": Limit(high=10**9),
    "max_body": Limit(low=1024, high=2**30),
    "max_length": Limit(low=2, high=2**24),
    "max_new_tokens": Limit(high=2**24),
    "max_windows": Limit(high=10**9),
    "min_p": Limit(kind=float, low=0, high=1),
    "minutes": Limit(kind=float, low=0.05, high=100_000),
    "port": Limit(low=0, high=65_535),
    "queue": Limit(low=0, high=10**6),
    "refine_tokens": Limit(high=10**12),
    "repetition_penalty": Limit(kind=float, low=0.01, high=100),
    "rows": Limit(high=10**7),
    "samples": Limit(high=4096),
    "seed": Limit(low=0, high=SEED_LIMIT),
    "seq_len": Limit(low=2, high=2**24),
    "slots": Limit(high=4096),
    "steps": Limit(high=10**6),
    "temperature": Limit(kind=float, low=0, high=1e6),
    "tokens": Limit(high=2**24),
    "top_k": Limit(low=0, high=2**26),
    "top_p": Limit(kind=float, low=0, high=1),
    "windows": Limit(high=10**7),
}


def check_number(name: str, value: Any, *, called: str | None = None) -> None:
    """Refuse a number outside the range that `LIMITS` has for its name.

    Args:
      name: of the entry in `LIMITS`.
      value: what is checked.
      called: what a message calls it, if not by its name.

    Raises:
      TwlaError: it is no such number, or outside.
    """
    if not LIMITS[name].accepts(value):
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}…"
        raise TwlaError(f"{called or name} {shown}: must be {LIMITS[name].words}")
