"""Routes requests: completions and chats in the form of OpenAI's API, the model's name, health and metrics.

No route reads or writes a file. The engine's tokens come from its thread and are read on the event loop.
"""

import asyncio
import concurrent.futures
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from twla_jax.errors import TwlaError
from twla_jax.inference.sampling import NOT_FINITE
from twla_jax.models.arguments import checked_tokens
from twla_jax.serving import openapi, protocol
from twla_jax.serving.admission import check_host, check_key, read_body
from twla_jax.serving.answers import Choice, Envelope, Piece
from twla_jax.serving.engine import Engine
from twla_jax.serving.mailbox import Mailbox
from twla_jax.serving.metrics import Metrics
from twla_jax.serving.protocol import ApiError, Asked
from twla_jax.serving.requests import Busy, Delivery, Generation
from twla_jax.serving.responses import EventStream, busy, event, failure, no_route, unless_gone
from twla_jax.serving.settings import ServiceSettings
from twla_jax.text import chat as chats

_GONE = 499  # a client that left; it is not sent
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


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
        self._mailbox: Mailbox | None = None
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
            exception_handlers={HTTPException: no_route},
        )

    def _answering(
        self, route: str, answer: Callable[[Request], Awaitable[Response]], secret: bool
    ) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that turns what goes wrong into a response, and counts it."""

        async def endpoint(request: Request) -> Response:
            try:
                if secret:
                    check_host(request, self._settings)
                    check_key(request, self._settings)
                response = await answer(request)
            except Busy as error:
                response = failure(busy(error))
            except ApiError as error:
                response = failure(error)
            except TwlaError as error:
                response = failure(ApiError(400, str(error)))
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            self.metrics.requests.labels(route, response.status_code).inc()
            return response

        return endpoint

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
        body = protocol.parse_json(await read_body(request, self._settings))
        names = (self._settings.model,)
        asked = protocol.parse(body, chat=chat, models=names, suggested=self._settings.suggested)
        if self.closing:
            raise Busy("the server is shutting down", None)
        loop = asyncio.get_running_loop()
        if asked.messages or any(isinstance(each, str) for each in asked.prompts):
            prompts = await loop.run_in_executor(self._tokenizing, self._encode, asked)
        else:
            prompts = self._encode(asked)
        generations = [
            self._generation(asked, prompt, choice) for prompt in prompts for choice in range(asked.choices)
        ]
        choices = [
            Choice(i, self._tokenizer, each.prompt, chat=chat, stop=asked.stop, top=asked.top)
            for i, each in enumerate(generations)
        ]
        deliveries: asyncio.Queue[tuple[Choice, Delivery]] = asyncio.Queue()
        mailbox = self._mailbox = self._mailbox or Mailbox(loop)

        def sink(choice: Choice) -> Callable[[Delivery], None]:
            return lambda delivery: mailbox.put(deliveries, (choice, delivery))

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
            events = self._events(envelope, choices, pieces, all_read=deliveries.empty, usage=asked.usage)
            return EventStream(events, leave=lambda: self._leave(choices))
        try:
            return JSONResponse(await unless_gone(request.receive, self._whole(envelope, choices, pieces)))
        finally:
            self._leave(choices)

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
        all_read: Callable[[], bool],
        usage: bool,
    ) -> AsyncIterator[bytes]:
        """Yield the events of a stream, those that come together as one: every write costs more than an event."""
        waiting = b"".join(event(begin) for each in choices if (begin := envelope.first(each)) is not None)
        if waiting:
            yield waiting
            waiting = b""
        try:
            async for choice, piece in pieces:
                if piece.text or piece.reason is not None or piece.logprobs is not None:
                    waiting += event(envelope.event(choice, piece))
                if waiting and all_read() and any(each.reason is None for each in choices):
                    yield waiting
                    waiting = b""
        except ApiError as error:
            yield waiting + event(error.body)
            return
        yield waiting + (event(envelope.last(choices)) if usage else b"") + b"data: [DONE]\n\n"

    def _leave(self, choices: list[Choice]) -> None:
        """Take what is not finished out of the engine: nobody listens any more."""
        left = [choice for choice in choices if choice.reason is None]
        for choice in left:
            self.engine.cancel(choice.ticket)
        self.metrics.cancelled.inc(bool(left))
