"""Makes responses: streams of events, failures, and an end for a client that has left."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from twla_jax.serving.protocol import ApiError
from twla_jax.serving.requests import Busy

_written = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class EventStream(Response):
    """Sends events until there are no more or the client has left, and says so when it ends, however it ends."""

    def __init__(self, events: AsyncIterator[bytes], *, leave: Callable[[], None]):
        super().__init__(headers={"cache-control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._leave = events, leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events to an ASGI server."""
        try:
            await unless_gone(receive, self._send_all(send))
        except ClientDisconnect:
            pass
        finally:
            self._leave()

    async def _send_all(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for body in self._events:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Any, work: Any) -> Any:
    """Return what `work` comes to, unless the client leaves before.

    Args:
      receive: of ASGI, after the request's body.
      work: what to wait for.

    Raises:
      ClientDisconnect: it has left; the work is stopped.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def event(data: Mapping[str, Any]) -> bytes:
    """Return a server-sent event that holds JSON."""
    return b"data: " + _written(data).encode() + b"\n\n"


def failure(error: ApiError) -> Response:
    """Return the response that tells a client of an error."""
    return JSONResponse(error.body, error.status, headers=error.headers)


def busy(error: Busy) -> ApiError:
    """Return the error that asks a client to come again later, if there is a later."""
    if error.retry_after is None:
        return ApiError(503, str(error))
    return ApiError(429, str(error), code="busy", headers={"retry-after": str(error.retry_after)})


async def no_route(request: Request, error: Exception) -> Response:
    """Return the response to a path or a method that the server does not have."""
    assert isinstance(error, HTTPException)
    return failure(ApiError(error.status_code, error.detail, headers=error.headers))
