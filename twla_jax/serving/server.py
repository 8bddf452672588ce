"""Runs the service on a socket until it is told to stop, and then lets requests finish for a while."""

import asyncio
import socket
import sys
from collections.abc import Callable

import uvicorn

from twla_jax.errors import TwlaError
from twla_jax.serving.app import Service

_LAST_WORDS = 5  # seconds in which streams that were cut off say so
_BESIDE = 1024  # connections beside those that have or wait for a slot
_TURN = 5e-4  # seconds after which the event loop lets the engine's thread on, which the device may wait for


class Server(uvicorn.Server):
    """Serves until `should_exit`, by a signal or by hand; then requests have `grace` seconds to finish."""

    def __init__(self, service: Service, *, grace: int):
        self._service, self._grace = service, grace
        settings = service.engine.settings
        super().__init__(
            uvicorn.Config(
                service.app(),
                http="h11",
                ws="none",
                loop="auto",  # uvloop, which orbax brings along where there is one
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=2 * (settings.slots + settings.queue) + _BESIDE,
                timeout_graceful_shutdown=grace + _LAST_WORDS,
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `should_exit`; threads of Python take turns more often meanwhile."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(_TURN)
        try:
            await super().serve(sockets)
        finally:
            sys.setswitchinterval(before)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what is new, let the rest finish, and end what is left in order when the time is over."""
        self._service.closing = True
        loop = asyncio.get_running_loop()
        cut = loop.call_later(self._grace, loop.run_in_executor, None, self._service.engine.close)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()
            await loop.run_in_executor(None, self._service.engine.close)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one.

    Raises:
      TwlaError: the address cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TwlaError(f"{host}:{port}: cannot listen there ({reason})") from None


def serve(
    service: Service, listening: socket.socket, *, grace: int = 30, ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until a signal stops it.

    Args:
      service: what answers.
      listening: from `listen`.
      grace: seconds that running requests have after the signal.
      ready: called before the first connection is taken.
    """
    server = Server(service, grace=grace)
    ready()
    server.run(sockets=[listening])
