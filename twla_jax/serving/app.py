"""Routes requests: completions and chats in the form of OpenAI's API, the model's name, health and metrics.

No route reads or writes a file. The engine's tokens come from its thread and are read on the event loop.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from twla_jax.errors import TwlaError
from twla_jax.inference.sampling import NOT_FINITE
from twla_jax.models.arguments import checked_tokens
from twla_jax.serving import openapi, protocol
from twla_jax.serving.answers import Choice, Envelope, Piece
from twla_jax.serving.engine import Engine
from twla_jax.serving.metrics import Metrics
from twla_jax.serving.protocol import ApiError, Asked
from twla_jax.serving.requests import Busy, Delivery, Generation
from twla_jax.text import chat as chats

_GONE = 499  # a client that left; it is not sent
_BODY_SECONDS = 30.0  # for the whole body of a request
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


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


class Service:
    """Answers requests by an engine."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: ServiceSettings):
        self.engine, self._tokenizer, self._settings = engine, tokenizer, settings
        self.closing = False
        slots = engine.settings.slots
        self.metrics = Metrics(running=lambda: engine.running, waiting=lambda: engine.waiting, slots=slots)
        self._chat_ends = chats.ends_of_answer(tokenizer, engine.config.eos_token_ids)
        # One thread: a tokenizer is not made for several.
        self._tokenizing = concurrent.futures.ThreadPoolExecutor(1, "twla-tokenizer")
        self._started = int(time.time())

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = (
            ("/v1/completions", "POST", self._completion, True),
            ("/v1/chat/completions", "POST", self._chat, True),
            ("/v1/models", "GET", self._models, True),
            ("/v1/models/{name:path}", "GET", self._one_model, True),
            ("/metrics", "GET", self._metrics_text, True),
            ("/health", "GET", self._health, False),
            ("/openapi.json", "GET", self._openapi, False),
        )
        return Starlette(
            routes=[
                Route(path, self._answering(path, answer, secret), methods=[method])
                for path, method, answer, secret in routes
            ],
            exception_handlers={HTTPException: _no_route},
        )

    def _answering(
        self, route: str, answer: Callable[[Request], Awaitable[Response]], secret: bool
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that turns what goes wrong into a response, and counts it."""

        async def endpoint(request: Request) -> Response:
            try:
                if secret:
                    self._check_host(request)
                    self._check_key(request)
                response = await answer(request)
            except Busy as error:
                response = _failure(_busy(error))
            except ApiError as error:
                response = _failure(error)
            except TwlaError as error:
                response = _failure(ApiError(400, str(error)))
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            self.metrics.requests.labels(route, response.status_code).inc()
            return response

        return endpoint

    def _check_host(self, request: Request) -> None:
        """Refuse a page of another site whose name was made to lead to this machine: it may send what it likes."""
        given = request.headers.get("host", "")
        name = given.rpartition(":")[0] if given.rpartition(":")[2].isdecimal() else given
        if self._settings.hosts and name and name.lower() not in self._settings.hosts:
            known = ", ".join(self._settings.hosts)
            raise ApiError(403, f"host {given[:80]!r}: is not {known}; other names need an API key")

    def _check_key(self, request: Request) -> None:
        if self._settings.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        both = given.encode("latin-1"), self._settings.key.encode()  # headers are read as Latin-1
        digests = [hashlib.sha256(each).digest() for each in both]
        if not hmac.compare_digest(*digests) or scheme.lower() != "bearer":
            headers = {"www-authenticate": "Bearer"}
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key", headers=headers)

    async def _health(self, request: Request) -> Response:
        status = "failed" if self.engine.error is not None else "closing" if self.closing else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.DESCRIPTION)

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=_METRICS)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._settings.model:
            raise ApiError(404, f"there is one model, {self._settings.model}", code="model_not_found")
        return JSONResponse(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        card = {"id": self._settings.model, "object": "model", "created": self._started, "owned_by": "twla"}
        return {**card, "max_model_len": self.engine.settings.max_length}

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        begun = time.monotonic()
        body = protocol.parse_json(await self._body(request))
        names = (self._settings.model,)
        asked = protocol.parse(body, chat=chat, models=names, suggested=self._settings.suggested)
        if self.closing:
            raise Busy("the server is shutting down", None)
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._tokenizing, self._encode, asked)
        generations = [
            self._generation(asked, prompt, choice) for prompt in prompts for choice in range(asked.choices)
        ]
        choices = [
            Choice(i, self._tokenizer, each.prompt, chat=chat, stop=asked.stop, top=asked.top)
            for i, each in enumerate(generations)
        ]
        deliveries: asyncio.Queue[tuple[Choice, Delivery]] = asyncio.Queue()

        def sink(choice: Choice) -> Callable[[Delivery], None]:
            def put(delivery: Delivery) -> None:
                with contextlib.suppress(RuntimeError):  # the loop may be closed at the very end
                    loop.call_soon_threadsafe(deliveries.put_nowait, (choice, delivery))

            return put

        tickets = self.engine.submit_all(
            [(each, sink(choice)) for each, choice in zip(generations, choices, strict=True)]
        )
        for choice, ticket in zip(choices, tickets, strict=True):
            choice.ticket = ticket
        tokens = sum(map(len, prompts))
        self.metrics.prompt_tokens.inc(tokens)
        envelope = Envelope(self._settings.model, tokens, chat=chat)
        pieces = self._pieces(choices, deliveries, begun)
        if asked.stream:
            events = self._events(envelope, choices, pieces, usage=asked.usage)
            return _Stream(events, leave=lambda: self._leave(choices))
        try:
            return JSONResponse(await _unless_gone(request, self._whole(envelope, choices, pieces)))
        finally:
            self._leave(choices)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which no page of another site can send unasked
            raise ApiError(415, "the content type must be application/json")
        most, body = self._settings.max_body, bytearray()
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

    def _encode(self, asked: Asked) -> list[tuple[int, ...]]:
        """Return the prompts as token ids; runs in a thread of its own, as long texts take a while."""
        if asked.messages:
            return [tuple(chats.encode_chat(self._tokenizer, asked.messages))]
        return [
            tuple(chats.encode_text(self._tokenizer, each)) if isinstance(each, str) else each
            for each in asked.prompts
        ]

    def _generation(self, asked: Asked, prompt: tuple[int, ...], choice: int) -> Generation:
        checked_tokens(list(prompt), self.engine.config, "prompt", ranks=(1,), fits=False)
        room = self.engine.settings.max_length - len(prompt)
        if room < 1:
            most = self.engine.settings.max_length
            message = f"the prompt has {len(prompt)} tokens; with its answer there is room for {most}"
            raise ApiError(400, message, code="context_length_exceeded")
        ends = self._chat_ends if asked.messages else self.engine.config.eos_token_ids
        seed = (asked.sampling.seed + choice) % (protocol.SEED_LIMIT + 1)
        return Generation(
            prompt=prompt,
            max_new_tokens=room if asked.max_new_tokens is None else asked.max_new_tokens,
            sampling=dataclasses.replace(asked.sampling, seed=seed),
            ends=() if asked.ignore_eos else tuple(ends),
            logprobs=asked.top is not None,
        )

    async def _pieces(
        self, choices: list[Choice], deliveries: asyncio.Queue[tuple[Choice, Delivery]], begun: float
    ) -> AsyncIterator[tuple[Choice, Piece]]:
        """Yield what is added to each choice, until all have ended.

        Raises:
          ApiError: the engine ends before they have.
        """
        left, told_first = len(choices), False
        while left:
            choice, delivery = await deliveries.get()
            if choice.reason is not None:  # made before the engine knew of a stop text
                continue
            before = choice.tokens
            piece = choice.read(delivery)
            self.metrics.new_tokens.inc(choice.tokens - before)
            if piece.reason == "aborted":
                reason = (
                    "the server is shutting down" if self.engine.error is None else "the engine has failed"
                )
                raise ApiError(503, reason, code="aborted")
            if piece.reason == "failed":
                raise ApiError(500, f"{NOT_FINITE} after {choice.tokens} tokens", code="not_finite")
            if not told_first:
                self.metrics.first.observe(time.monotonic() - begun)
                told_first = True
            if piece.reason is not None:
                left -= 1
                self.engine.cancel(choice.ticket)
            yield choice, piece
        self.metrics.whole.observe(time.monotonic() - begun)

    async def _whole(
        self, envelope: Envelope, choices: list[Choice], pieces: AsyncIterator[tuple[Choice, Piece]]
    ) -> dict[str, Any]:
        found: list[list[Piece]] = [[] for _ in choices]
        async for choice, piece in pieces:
            found[choice.index].append(piece)
        return envelope.whole(choices, found)

    async def _events(
        self,
        envelope: Envelope,
        choices: list[Choice],
        pieces: AsyncIterator[tuple[Choice, Piece]],
        *,
        usage: bool,
    ) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        for choice in choices:
            if (begin := envelope.first(choice)) is not None:
                yield _event(begin)
        try:
            async for choice, piece in pieces:
                if piece.text or piece.reason is not None or piece.logprobs is not None:
                    yield _event(envelope.event(choice, piece))
        except ApiError as error:
            yield _event(error.body)
            return
        if usage:
            yield _event(envelope.last(choices))
        yield b"data: [DONE]\n\n"

    def _leave(self, choices: list[Choice]) -> None:
        """Take what is not finished out of the engine: nobody listens any more."""
        left = [choice for choice in choices if choice.reason is None]
        for choice in left:
            self.engine.cancel(choice.ticket)
        self.metrics.cancelled.inc(bool(left))


class _Stream(StreamingResponse):
    """Sends events, and says so when it ends, however it ends."""

    def __init__(self, events: AsyncIterator[bytes], *, leave: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _unless_gone(request: Request, work: Any) -> Any:
    """Return what `work` comes to, unless the client leaves before.

    Raises:
      ClientDisconnect: it has left; the work is stopped.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
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


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _failure(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _busy(error: Busy) -> ApiError:
    if error.retry_after is None:
        return ApiError(503, str(error))
    return ApiError(429, str(error), code="busy", headers={"retry-after": str(error.retry_after)})


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _failure(ApiError(error.status_code, error.detail, headers=error.headers))
