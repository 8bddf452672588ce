"""Schedules requests: they wait in a queue, take a slot, and leave it, between decode steps that all share.

One thread owns the device. It hands it the next steps before it reads the last ones' tokens, so that the device never
waits for the host.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.decoder import Decoder
from twla_jax.serving.requests import Busy, Delivery, Generation, Ticket, check
from twla_jax.serving.rows import Made
from twla_jax.serving.runner import CALL_SECONDS, Runner
from twla_jax.serving.schedule import Schedule
from twla_jax.serving.settings import EngineSettings

_PREFILL = (
    2048  # tokens of prompts, with padding, between two decode calls; twice as many if no request ran before
)
_NEEDED = 0.8  # part of a loop of fixed length that must be needed
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """Holds a call handed to the device: its tokens, the request of each row, its start, and whether it is a loop."""

    made: Made
    tickets: Mapping[int, Ticket]
    handed: float
    steps: bool


class Engine:
    """Runs requests on one model until it is closed. Its methods may be called from any thread.

    Attributes:
      settings: those it was made with.
      config: of the model.
      error: what ended it; None while it runs.
      seconds: that its thread has spent: handing over prompts and steps, waiting for their tokens, and telling them.
    """

    def __init__(self, model: Decoder, settings: EngineSettings | None = None):
        """Take memory for all slots, compile everything and start the thread; by default with plain settings.

        Raises:
          TwlaError: there is no such model, `max_length` exceeds its positions, or the device's memory is too small.
        """
        settings = EngineSettings() if settings is None else settings
        self._runner = Runner(model, settings)
        self.settings, self.config = settings, model.config
        self._schedule = Schedule(settings.slots, self._runner.width, self._runner.together)
        self._in_flight: collections.deque[_Call] = collections.deque()
        self._changed = threading.Condition()
        self._closing, self._pace, self._step_seconds, self._told_at = False, 0.0, 0.0, 0.0
        self.error: BaseException | None = None
        self.seconds = {"reading": 0.0, "steps": 0.0, "waiting": 0.0, "telling": 0.0}
        self._thread = threading.Thread(target=self._run, name="twla-engine", daemon=True)
        self._thread.start()

    @property
    def cache_bytes(self) -> int:
        """Returns the bytes of keys and values of all slots."""
        return self._runner.cache_bytes

    @property
    def programs(self) -> Mapping[str, Any]:
        """Returns the jitted functions by name."""
        return self._runner.programs

    @property
    def fixed(self) -> Mapping[int, int]:
        """Returns the steps of the loops of fixed length by their number of rows; empty where there are none."""
        return self._runner.fixed

    @property
    def running(self) -> int:
        """Returns how many requests have a slot, or are about to take one."""
        return self.settings.slots - self._schedule.room

    @property
    def waiting(self) -> int:
        """Returns how many requests wait for a slot."""
        return len(self._schedule.waiting)

    def submit(self, generation: Generation, sink: Callable[[Delivery], None]) -> Ticket:
        """Queue a request; its tokens go to `sink`, from the engine's thread, the last of them with why it ended.

        Raises:
          TwlaError: the prompt is empty, too long or outside the vocabulary, a setting is out of range, or there will
            never be so many places.
          Busy: too many wait already, or the engine is closing.
        """
        (ticket,) = self.submit_all([(generation, sink)])
        return ticket

    def submit_all(self, requests: list[tuple[Generation, Callable[[Delivery], None]]]) -> list[Ticket]:
        """Queue several requests, all of them or none; arguments and errors are those of `submit`."""
        tickets = [Ticket(generation=each, sink=sink) for each, sink in requests]
        for ticket in tickets:
            check(ticket.generation, self.config, self.settings.max_length)
        if len(tickets) > (places := self.settings.queue + self.settings.slots):
            raise TwlaError(
                f"{len(tickets)} answers are asked for at once; there are places for {places} in all"
            )
        with self._changed:
            if self.error is not None or self._closing:
                raise Busy(
                    "the server is shutting down" if self.error is None else "the engine has failed", None
                )
            if self.waiting + len(tickets) > self.settings.queue + self._schedule.room:
                raise Busy("too many requests are waiting", self._seconds_to_wait())
            self._schedule.waiting.extend(tickets)
            self._changed.notify_all()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """End a request without another word to its sink; one that has ended stays as it is."""
        with self._changed:
            ticket.done = True
            self._changed.notify_all()

    def close(self) -> None:
        """End all requests, each with the reason `aborted`, and stop the thread; does nothing a second time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _seconds_to_wait(self) -> int:
        """Return a guess of when a slot will be free, for clients that ask again."""
        return min(60, max(1, math.ceil(self._pace * (1 + self.waiting / self.settings.slots))))

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except BaseException as error:
            _log.exception("the engine has failed")
            with self._changed:
                self.error = error
        finally:
            self._abort()

    @contextlib.contextmanager
    def _spending(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - begun

    def _wait(self) -> bool:
        """Return True once there is something to do, False if the engine is to stop."""
        schedule = self._schedule
        with self._changed:
            while not (self._closing or schedule.waiting or schedule.prefilling or self._in_flight):
                schedule.release()
                if schedule.room < self.settings.slots:
                    break
                self._changed.wait()
            return not self._closing

    def _turn(self) -> None:
        """Admit what there is room for, hand the device the next steps, and deliver those before."""
        earlier = len(self._in_flight)
        with self._changed:
            self._schedule.release()
        room = _PREFILL if self._schedule.active else 2 * _PREFILL
        left = self._admit(room)
        if left < room and self._runner.blocks:
            # First tokens are told before steps are handed over: requests that have come by then would have to wait
            # for these steps.
            self._deliver_all()
            earlier = 0
            with self._changed:
                self._schedule.release()
            self._admit(left)
        with self._changed:
            moves = self._schedule.moves(self.settings.row_counts)
        for source, target in moves:
            self._runner.move(source, target)
        active = self._schedule.active
        if active and self._runner.blocks and self._loop_ahead(active) is None:
            # The next call would not return before it is over: what is there is told first.
            self._deliver_all()
            earlier, active = 0, self._schedule.active
        if active:
            with self._spending("steps"):
                self._step(active)
        # What was handed over in this turn is read in the next one, if there is one.
        while self._in_flight and (earlier or not active):
            self._deliver(self._in_flight.popleft())
            earlier -= 1

    def _rows(self, active: Mapping[int, Ticket]) -> int:
        """Return how many slots, the first ones, a call has to run for these requests."""
        return next(n for n in self.settings.row_counts if n > max(active))

    def _loop_ahead(self, active: Mapping[int, Ticket]) -> int | None:
        """Return the rows of the loop of fixed length that can run for these requests; None if none can."""
        rows = self._rows(active)
        steps = self._runner.fixed.get(rows)
        left = max(each.left for each in active.values())
        # A last loop that is somewhat too long takes less time than one that is handed over step by step.
        if steps is None or self._schedule.waits or _NEEDED * steps > left:
            return None
        return None if any(each.generation.logprobs for each in active.values()) else rows

    def _step(self, active: Mapping[int, Ticket]) -> None:
        """Hand over the next steps: few where requests wait for them, or where they take long."""
        keep = np.isin(np.arange(self.settings.slots), list(active))
        if (ahead := self._loop_ahead(active)) is not None:
            filtered = any(each.generation.filtered for each in active.values())
            made = functools.partial(self._runner.fixed_steps, ahead, keep, filtered=filtered)
            self._hand_over(made, active, self._runner.fixed[ahead])
            return
        rows = self._rows(active)
        most = 1 if self._schedule.waits else int(CALL_SECONDS / max(self._step_seconds, 1e-6))
        left = max(each.left for each in active.values())
        count = max(1, min(left, self.settings.steps, most))
        self._hand_over(lambda: self._runner.steps(rows, keep, count), active, count)

    def _hand_over(
        self, call: Callable[[], Made], tickets: Mapping[int, Ticket], steps: int | None = None
    ) -> None:
        """Hand the device a call of so many steps, or one that reads prompts; it may return when that is over."""
        begun = time.monotonic()
        self._in_flight.append(_Call(made=call(), tickets=tickets, handed=begun, steps=bool(steps)))
        for ticket in tickets.values():
            ticket.handed += steps or 1

    def _admit(self, budget: int) -> int:
        """Read waiting prompts and put them into slots; returns what is left of the budget, tokens with padding."""
        with self._spending("reading"):
            while budget > 0:
                with self._changed:
                    slots = self._schedule.read_next()
                if slots:
                    budget -= self._read(slots)
                elif (long := self._schedule.prefilling) is not None:
                    budget -= self._read_on(long)
                else:
                    break
        return budget

    def _read(self, slots: Mapping[int, Ticket]) -> int:
        """Read whole prompts into slots, in one call; returns how many places for tokens it had."""
        tickets = list(slots.values())
        prompts = [each.generation for each in tickets]
        self._hand_over(lambda: self._runner.read(prompts, list(slots)), dict(enumerate(tickets)))
        return (self._schedule.width(tickets[0]) or 0) * len(self._in_flight[-1].made.counts)

    def _read_on(self, ticket: Ticket) -> int:
        """Read a chunk of a long prompt, and put it into a slot with its last one; returns the places that it took."""
        prompt = ticket.generation.prompt
        logits, count, width = self._runner.prefill(prompt, ticket.prefilled)
        ticket.prefilled += count
        if ticket.prefilled == len(prompt):
            slot = self._schedule.free[0]
            self._hand_over(lambda: self._runner.admit(ticket.generation, logits, slot), {0: ticket})
            with self._changed:
                self._schedule.place_long()
        return width

    def _deliver_all(self) -> None:
        """Deliver what was handed over, once it is there."""
        while self._in_flight:
            self._deliver(self._in_flight.popleft())

    def _deliver(self, call: _Call) -> None:
        """Tell every request its new tokens; waits for the device."""
        made, tickets = call.made, call.tickets
        told = any(ticket.generation.logprobs for ticket in tickets.values())
        with self._spending("waiting"):
            tokens, counts, figures = jax.device_get((made.tokens, made.counts, made.told if told else None))
        now = time.monotonic()
        if call.steps and counts.any():
            taken = (now - max(call.handed, self._told_at)) / int(counts.max())
            self._step_seconds = 0.7 * self._step_seconds + 0.3 * taken
        self._told_at = now
        with self._spending("telling"):
            self._tell(call, tokens, counts, figures, now)

    def _tell(self, call: _Call, tokens: np.ndarray, counts: np.ndarray, figures: Any, now: float) -> None:
        for index, ticket in call.tickets.items():
            count = int(counts[index])
            if ticket.done or not count:
                continue
            ticket.made += count
            new = tokens[index, :count].tolist()
            asked, reason = ticket.generation, None
            if new[-1] < 0:
                if ticket.made == 1 and ticket.prefilled and self._reads_again(ticket):
                    continue
                new, reason = new[:-1], "failed"
            elif new[-1] in asked.ends:
                reason = "stop"
            elif ticket.made == asked.max_new_tokens:
                reason = "length"
            if reason is not None:
                ticket.done = True
                self._pace = 0.8 * self._pace + 0.2 * (now - ticket.began)
            own = None
            if figures is not None and asked.logprobs:
                own = jax.tree.map(lambda leaf, index=index, count=count: leaf[index, :count], figures)
            ticket.sink(Delivery(tokens=new, told=own, reason=reason))

    def _reads_again(self, ticket: Ticket) -> bool:
        """Return whether a long prompt whose logits were not finite is read a second time, into an empty row.

        The row for long prompts may hold what is not finite from the one before, and then it is not the request's own.
        """
        self._runner.forget()
        with self._changed:
            if self._schedule.prefilling is not None:
                self._schedule.prefilling.prefilled = 0
            if ticket.retried:
                return False
            self._schedule.read_again(ticket)
        return True

    def _abort(self) -> None:
        with self._changed:
            self._closing, left = True, self._schedule.everyone
            self._schedule = Schedule(self.settings.slots, self._runner.width, self._runner.together)
        for ticket in left:
            if not ticket.done:
                ticket.done = True
                ticket.sink(Delivery(tokens=[], told=None, reason="aborted"))
