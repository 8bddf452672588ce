"""Keeps account of requests: which wait, which prompt is read next, and which slot each one has."""

import collections
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from twla_jax.serving.requests import Ticket

_ENOUGH = (
    4  # a call that reads several prompts must use one in so many of its rows, or it costs more than it saves
)


class Schedule:
    """Holds all requests of an engine, whose lock is held while it changes.

    Attributes:
      waiting: requests without a slot, the first of them first.
      running: the request in each slot, or None.
      prefilling: the request whose long prompt is read by chunks; a slot is free for it.
    """

    def __init__(self, slots: int, width: Callable[[int], int | None], together: Mapping[int, Sequence[int]]):
        """Begin with free slots.

        Args:
          slots: how many there are.
          width: returns the places for a prompt of some length, None if it is read by chunks.
          together: how many prompts of a width may be read in one call beside one alone, ascending; see `Runner`.
        """
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.running: list[Ticket | None] = [None] * slots
        self.prefilling: Ticket | None = None
        self._width, self._together = width, together

    @property
    def free(self) -> list[int]:
        """Returns the free slots."""
        return [i for i, each in enumerate(self.running) if each is None]

    @property
    def room(self) -> int:
        """Returns how many slots are free and for nobody."""
        return len(self.free) - (self.prefilling is not None)

    @property
    def everyone(self) -> list[Ticket]:
        """Returns all requests."""
        found = [*self.waiting, self.prefilling, *self.running]
        return [each for each in found if each is not None]

    @property
    def active(self) -> dict[int, Ticket]:
        """Returns the requests in slots, but for those that are over or whose last token is on its way."""
        running = enumerate(self.running)
        return {i: each for i, each in running if each is not None and each.left and not each.done}

    @property
    def waits(self) -> bool:
        """Returns whether a prompt waits that could be read after a step."""
        return self.prefilling is not None or (bool(self.waiting) and None in self.running)

    def release(self) -> None:
        """Free the slots of requests that are over, and forget those that wait."""
        self.running = [None if each is None or each.done else each for each in self.running]
        self.waiting = collections.deque(each for each in self.waiting if not each.done)
        if self.prefilling is not None and self.prefilling.done:
            self.prefilling = None

    def width(self, ticket: Ticket) -> int | None:
        """Return the places that a request's prompt takes in a call, or None if it is read by chunks."""
        return self._width(len(ticket.generation.prompt))

    def read_next(self) -> dict[int, Ticket]:
        """Return the requests whose prompts are read next, in one call, each in a slot that it now has.

        They are the first one that waits and others whose prompts are padded to the same width. If its prompt is long,
        there are none, and it is `prefilling`.
        """
        free = self.free
        if self.prefilling is not None or not self.waiting or not free:
            return {}
        width = self.width(self.waiting[0])
        if width is None:
            self.prefilling = self.waiting.popleft()
            _begin([self.prefilling])
            return {}
        alike = [each for each in self.waiting if self.width(each) == width][: len(free)]
        few, *more = self._together.get(width, (1,))
        # Of a larger call, half must be in use: it takes the device longer, not only the host.
        size = max([n for n in more if 2 * len(alike) >= n], default=few)
        group = alike[:size] if len(alike) * _ENOUGH >= few else alike[:1]
        self.waiting = collections.deque(each for each in self.waiting if each not in group)
        _begin(group)
        slots = dict(zip(free, group, strict=False))
        for slot, each in slots.items():
            self.running[slot] = each
        return slots

    def place_long(self) -> None:
        """Give the request whose long prompt was read the first free slot."""
        self.running[self.free[0]], self.prefilling = self.prefilling, None

    def read_again(self, ticket: Ticket) -> None:
        """Let a request whose long prompt was read begin anew, as the next one."""
        ticket.retried, ticket.prefilled, ticket.made, ticket.handed = True, 0, 0, 0
        self.running = [None if each is ticket else each for each in self.running]
        self.waiting.appendleft(ticket)

    def moves(self, row_counts: Iterable[int]) -> list[tuple[int, int]]:
        """Move requests into the first slots where fewer rows are enough; returns the slots, from and to."""
        used = [i for i, each in enumerate(self.running) if each is not None]
        enough = next((n for n in row_counts if n >= len(used)), 0)
        found = []
        for source in (i for i in used if i >= enough):
            target = self.free[0]
            self.running[target], self.running[source] = self.running[source], None
            found.append((source, target))
        return found


def _begin(tickets: Iterable[Ticket]) -> None:
    for each in tickets:
        each.began = time.monotonic()
