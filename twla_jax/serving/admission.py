"""Lets requests in: from known hosts, with the key, with a body of JSON that is short and comes in time."""

import asyncio
import hashlib
import hmac

from starlette.requests import Request

from twla_jax.serving.protocol import ApiError
from twla_jax.serving.settings import ServiceSettings

_BODY_SECONDS = 30.0  # for the whole body of a request


def check_host(request: Request, settings: ServiceSettings) -> None:
    """Refuse a page of another site whose name was made to lead to this machine: it may send what it likes."""
    given = request.headers.get("host", "")
    name = given.rpartition(":")[0] if given.rpartition(":")[2].isdecimal() else given
    if settings.hosts and name and name.lower() not in settings.hosts:
        known = ", ".join(settings.hosts)
        raise ApiError(403, f"host {given[:80]!r}: is not {known}; other names need an API key")


def check_key(request: Request, settings: ServiceSettings) -> None:
    """Refuse a request without the server's API key, if it has one."""
    if settings.key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    both = given.encode("latin-1"), settings.key.encode()  # headers are read as Latin-1
    digests = [hashlib.sha256(each).digest() for each in both]
    if not hmac.compare_digest(*digests) or scheme.lower() != "bearer":
        headers = {"www-authenticate": "Bearer"}
        raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key", headers=headers)


async def read_body(request: Request, settings: ServiceSettings) -> bytes:
    """Return the body of a request, once all of it is there."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no page of another site can send unasked
        raise ApiError(415, "the content type must be application/json")
    most, body = settings.max_body, bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise ApiError(
                        413, f"the body is longer than {most} bytes", headers={"connection": "close"}
                    )
    except TimeoutError:
        raise ApiError(408, "the body took too long to arrive", headers={"connection": "close"}) from None
    return bytes(body)
