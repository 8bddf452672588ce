"""Describes how much an engine does at once, and what a service answers to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from twla_jax.limits import check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Describes how much an engine does at once.

    Attributes:
      slots: requests that run together.
      max_length: tokens of a request, prompt and answer together.
      queue: requests that wait at most.
      steps: decode steps of a call at most, fewer where they take long; tokens arrive that many at a time.
      rows: how many slots a step may take along, the first ones; all of them, too. By default 1, 8 and its doubles.
      one_shape: whether every step takes all slots along, and every prompt is read alone: then not even the last bit
        of an answer depends on other requests.
      chunks: tokens of a prompt that go in at a time, ascending; by default as `generate` takes them.
      together: tokens, with padding, of a call that reads several prompts, and a quarter of those of a larger call for
        the shortest prompts; fewer than two of the shortest chunks for none. By default 1024, and none on a CPU, which
        takes its time for every one of them.
      ahead: whether loops of a fixed number of steps are compiled, too, which are handed over at once, for requests
        without log-probabilities; by default on a GPU.
      cache_dtype: of keys and values; None for the model's own.

    Raises:
      TwlaError: a number is out of its range.
    """

    slots: int = 16
    max_length: int = 2048
    queue: int = 64
    steps: int = 32
    rows: tuple[int, ...] = ()
    one_shape: bool = False
    chunks: tuple[int, ...] = (64, 128, 256, 512)
    together: int | None = None
    ahead: bool | None = None
    cache_dtype: Any = None

    def __post_init__(self):
        for name in ("slots", "max_length", "queue", "steps"):
            check_number(name, getattr(self, name))

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Returns how many slots a step may take along, ascending, all of them last."""
        counts = (self.slots,) if self.one_shape else self.rows or (1, *(8 * 2**i for i in range(20)))
        return (*sorted(n for n in set(counts) if n < self.slots), self.slots)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Describes what a service answers to.

    Attributes:
      model: the name that requests give.
      key: that requests must bear; None for none.
      hosts: names that requests may call the server by, without the port; empty for any.
      max_body: bytes of a request at most.
      suggested: sampling settings for what a request leaves open.
    """

    model: str
    key: str | None = None
    hosts: tuple[str, ...] = ()
    max_body: int = 2**20
    suggested: Mapping[str, Any] = dataclasses.field(default_factory=dict)
