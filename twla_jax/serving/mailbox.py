"""Passes what the engine's thread says on to the event loop."""

import asyncio
import collections
import contextlib
from typing import Any


class Mailbox:
    """Takes letters from another thread, and wakes the event loop once for all that come together.

    To wake it means to write to a socket, and a call of the device has news for every request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._woken = loop, False
        self._letters: collections.deque[tuple[asyncio.Queue[Any], Any]] = collections.deque()

    def put(self, queue: asyncio.Queue[Any], letter: Any) -> None:
        """Put a letter into a queue of the event loop, soon; may be called from any thread."""
        self._letters.append((queue, letter))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop may be closed at the very end
                self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._woken = False  # first: what is put from here on wakes the loop again
        while self._letters:
            queue, letter = self._letters.popleft()
            queue.put_nowait(letter)
