"""Counts what a server tells Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts requests and tokens; each server has numbers of its own.

    Attributes:
      requests: by route and HTTP status.
      prompt_tokens: of requests that were queued.
      new_tokens: that clients were given.
      cancelled: requests whose clients left.
      first: seconds from a request to its first token.
      whole: seconds from a request to the end of its answer.
    """

    def __init__(self, *, running: Callable[[], float], waiting: Callable[[], float], slots: int):
        self.registry = CollectorRegistry()
        counter: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("twla_requests", "Requests answered", ["route", "status"], **counter)
        self.prompt_tokens = Counter("twla_prompt_tokens", "Tokens of prompts", **counter)
        self.new_tokens = Counter("twla_new_tokens", "Tokens of answers", **counter)
        self.cancelled = Counter("twla_cancelled", "Requests whose clients left", **counter)
        self.first = Histogram(
            "twla_first_token_seconds", "Time to the first token", buckets=_SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "twla_request_seconds", "Time to the end of an answer", buckets=_SECONDS, registry=self.registry
        )
        for name, words, value in (
            ("twla_running", "Requests in slots", running),
            ("twla_waiting", "Requests that wait for a slot", waiting),
            ("twla_slots", "Slots", lambda: slots),
        ):
            Gauge(name, words, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Return all numbers in Prometheus's text format."""
        return generate_latest(self.registry)
