"""Schedules requests: they wait in a queue, take a slot, and leave it, between decode steps that all share.

One thread owns the device. It hands it the next steps before it reads the last ones' tokens, so that the device never
waits for the host.
"""

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.decoder import Decoder
from twla_jax.serving.requests import Busy, Delivery, Generation, Ticket, check
from twla_jax.serving.rows import Made
from twla_jax.serving.runner import Runner
from twla_jax.serving.settings import EngineSettings

_PREFILL = 512  # tokens of prompts between two decode calls
_CALL_SECONDS = 0.03  # of a decode call, for which a request that arrives has to wait
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """Holds a call handed to the device: its tokens, the request of each row, its start, and whether it is a loop."""

    made: Made
    tickets: Mapping[int, Ticket]
    handed: float
    steps: bool


class Engine:
    """Runs requests on one model until it is closed. Its methods may be called from any thread."""

    def __init__(self, model: Decoder, settings: EngineSettings | None = None):
        """Take memory for all slots, compile everything and start the thread; by default with plain settings.

        Raises:
          TwlaError: there is no such model, `max_length` exceeds its positions, or the device's memory is too small.
        """
        settings = EngineSettings() if settings is None else settings
        self._runner = Runner(model, settings)
        self.settings, self.config = settings, model.config
        self._running: list[Ticket | None] = [None] * settings.slots
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._prefilling: Ticket | None = None
        self._in_flight: collections.deque[_Call] = collections.deque()
        self._changed = threading.Condition()
        self._closing, self._pace, self._step_seconds, self._read = False, 0.0, 0.0, 0.0
        self.error: BaseException | None = None
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
    def running(self) -> int:
        """Returns how many requests have a slot, or are about to take one."""
        return sum(each is not None for each in self._running) + (self._prefilling is not None)

    @property
    def waiting(self) -> int:
        """Returns how many requests wait for a slot."""
        return len(self._waiting)

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
            free = self._running.count(None) - (self._prefilling is not None)
            if len(self._waiting) + len(tickets) > self.settings.queue + free:
                raise Busy("too many requests are waiting", self._seconds_to_wait())
            self._waiting.extend(tickets)
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
        return min(60, max(1, math.ceil(self._pace * (1 + len(self._waiting) / self.settings.slots))))

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

    def _wait(self) -> bool:
        """Return True once there is something to do, False if the engine is to stop."""
        with self._changed:
            while not (self._closing or self._waiting or self._prefilling or self._in_flight):
                if any(each is not None and not each.done for each in self._running):
                    break
                self._running = [None] * len(self._running)
                self._changed.wait()
            return not self._closing

    def _turn(self) -> None:
        """Admit what there is room for, hand the device the next steps, and deliver those before."""
        begin = len(self._in_flight)
        self._release()
        self._admit()
        self._compact()
        active = {i: ticket for i, ticket in enumerate(self._running) if ticket is not None}
        if active:
            rows = next(n for n in self.settings.row_counts if n > max(active))
            keep = np.isin(np.arange(len(self._running)), list(active))
            self._hand_over(self._runner.steps(rows, keep, self._count(len(active))), active, steps=True)
        # What was handed over in this turn is read in the next one, if there is one.
        while self._in_flight and (begin or not active):
            self._deliver(self._in_flight.popleft())
            begin -= 1

    def _count(self, active: int) -> int:
        """Return how many steps the next call is of: few where requests wait for it, or where steps take long."""
        if self._prefilling is not None or (self._waiting and active < len(self._running)):
            return 1
        return max(1, min(self.settings.steps, int(_CALL_SECONDS / max(self._step_seconds, 1e-6))))

    def _hand_over(self, made: Made, tickets: Mapping[int, Ticket], *, steps: bool) -> None:
        self._in_flight.append(_Call(made=made, tickets=tickets, handed=time.monotonic(), steps=steps))

    def _release(self) -> None:
        """Free the slots of requests that are over."""
        with self._changed:
            self._running = [None if each is None or each.done else each for each in self._running]
            self._waiting = collections.deque(each for each in self._waiting if not each.done)
            if self._prefilling is not None and self._prefilling.done:
                self._prefilling = None

    def _admit(self) -> None:
        """Prefill waiting prompts, by so many tokens at a time, and put those that are whole into slots."""
        budget = _PREFILL
        while budget > 0:
            with self._changed:
                if self._prefilling is None and self._waiting and None in self._running:
                    self._prefilling = self._waiting.popleft()
                    self._prefilling.began = time.monotonic()
            ticket = self._prefilling
            if ticket is None:
                return
            prompt = ticket.generation.prompt
            logits, count, width = self._runner.prefill(prompt, ticket.prefilled)
            ticket.prefilled += count
            budget -= width
            if ticket.prefilled == len(prompt):
                self._place(ticket, logits)

    def _place(self, ticket: Ticket, logits: jax.Array) -> None:
        slot = self._running.index(None)
        self._hand_over(self._runner.admit(ticket.generation, logits, slot), {0: ticket}, steps=False)
        with self._changed:
            self._running[slot], self._prefilling = ticket, None

    def _compact(self) -> None:
        """Move requests into the first slots where fewer rows are enough for them."""
        used = [i for i, each in enumerate(self._running) if each is not None]
        enough = next((n for n in self.settings.row_counts if n >= len(used)), 0)
        for source in (i for i in used if i >= enough):
            target = self._running.index(None)
            self._runner.move(source, target)
            with self._changed:
                self._running[target], self._running[source] = self._running[source], None

    def _deliver(self, call: _Call) -> None:
        """Tell every request its new tokens; waits for the device."""
        made, tickets = call.made, call.tickets
        told = any(ticket.generation.logprobs for ticket in tickets.values())
        tokens, counts = np.asarray(made.tokens), np.asarray(made.counts)
        figures = jax.tree.map(np.asarray, made.told) if told else None
        now = time.monotonic()
        if call.steps and counts.any():
            taken = (now - max(call.handed, self._read)) / int(counts.max())
            self._step_seconds = 0.7 * self._step_seconds + 0.3 * taken
        self._read = now
        for index, ticket in tickets.items():
            count = int(counts[index])
            if ticket.done or not count:
                continue
            ticket.made += count
            new = tokens[index, :count].tolist()
            asked, reason = ticket.generation, None
            if new[-1] < 0:
                if ticket.made == 1 and self._reads_again(ticket):
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
        """Return whether a prompt whose logits were not finite is read a second time, into an empty row.

        The row for prompts may hold what is not finite from the prompt before, and then it is not the request's own.
        """
        self._runner.forget()
        with self._changed:
            if self._prefilling is not None:
                self._prefilling.prefilled = 0
            if ticket.retried:
                return False
            ticket.retried, ticket.prefilled, ticket.made = True, 0, 0
            self._running = [None if each is ticket else each for each in self._running]
            self._waiting.appendleft(ticket)
        return True

    def _abort(self) -> None:
        with self._changed:
            left = [*self._waiting, self._prefilling, *self._running]
            self._closing = True
            self._waiting.clear()
            self._prefilling, self._running = None, [None] * len(self._running)
        for ticket in left:
            if ticket is not None and not ticket.done:
                ticket.done = True
                ticket.sink(Delivery(tokens=[], told=None, reason="aborted"))
