"""Reads requests in the form of OpenAI's API: every value checked, nothing left out without a word."""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.inference.sampling import Sampling
from twla_jax.limits import SEED_LIMIT
from twla_jax.schema import (
    Check,
    boolean,
    either,
    integer,
    mapping,
    number,
    one_of,
    record,
    sequence,
    shown,
    text,
)
from twla_jax.serving.rows import MOST_TOP

DEFAULT_NEW_TOKENS = 16  # of a completion without `max_tokens`, as OpenAI has it; a chat goes on to the limit
_MOST_CHOICES = 16
_MOST_PROMPTS = 64
_MOST_STOPS = 16
_MOST_MESSAGES = 4096
_TEXT = 2**24
_WHOLE = integer(0, 2**31 - 1)


class ApiError(Exception):
    """A request that cannot be answered.

    Attributes:
      status: of HTTP.
      message: one line for a person.
      param: the key that is to blame.
      code: one word for a program.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """Returns the body of the response."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Holds what a request asks for.

    Attributes:
      prompts: of a completion, each text or token ids; empty of a chat.
      messages: of a chat.
      choices: answers for each prompt.
      max_new_tokens: None where the request does not say.
      sampling: of the first choice; each further one has the next seed.
      stop: texts that end an answer.
      stream: whether tokens are wanted as they come.
      usage: whether a stream ends with its usage.
      top: how many likeliest tokens are told at each place; None where no log-probabilities are.
      ignore_eos: whether an answer goes on past the model's end.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[dict[str, str], ...]
    choices: int
    max_new_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    top: int | None
    ignore_eos: bool


def _only(value: Any, words: str) -> Check:
    """Accept what asks for nothing that is not there."""

    def accepts(given: Any) -> bool:  # `False == 0`
        return given == value and isinstance(given, bool) == isinstance(value, bool)

    return Check(expected=f"{words}; other values are not supported", accepts=accepts)


_PART = record(type=one_of("text"), text=text(_TEXT))
_MESSAGE = record(
    role=one_of("system", "developer", "user", "assistant", "tool"),
    content=either(text(_TEXT), sequence(_PART, longest=_MOST_MESSAGES)),
)
_IDS = sequence(_WHOLE, longest=_TEXT, shortest=1)
_COMMON = {
    "model": text(),
    "max_tokens": integer(1, 2**24),
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": integer(-1, 2**26),
    "min_p": number(0, 1),
    "n": integer(1, _MOST_CHOICES),
    "seed": integer(0, SEED_LIMIT),
    "stop": either(text(), sequence(text(), longest=_MOST_STOPS)),
    "stream": boolean(),
    "stream_options": mapping(boolean()),
    "ignore_eos": boolean(),
    "frequency_penalty": _only(0, "0"),
    "presence_penalty": _only(0, "0"),
    "logit_bias": _only({}, "empty"),
    # What says nothing about the answer.
    "user": text(),
    "metadata": mapping(),
    "store": boolean(),
    "service_tier": text(),
    "safety_identifier": text(),
    "prompt_cache_key": text(),
}
_PROMPT = dataclasses.replace(
    either(
        text(_TEXT),
        _IDS,
        sequence(text(_TEXT), longest=_MOST_PROMPTS, shortest=1),
        sequence(_IDS, longest=_MOST_PROMPTS, shortest=1),
    ),
    expected=f"a text, token ids, or a list of up to {_MOST_PROMPTS} of either",
)
_COMPLETION = {
    **_COMMON,
    "prompt": _PROMPT,
    "logprobs": integer(0, MOST_TOP),
    "best_of": _only(1, "1"),
    "echo": _only(False, "false"),
    "suffix": _only("", "empty"),
}
_CHAT = {
    **_COMMON,
    "messages": sequence(_MESSAGE, longest=_MOST_MESSAGES, shortest=1),
    "max_completion_tokens": integer(1, 2**24),
    "logprobs": boolean(),
    "top_logprobs": integer(0, MOST_TOP),
    "tools": _only([], "empty"),
    "tool_choice": one_of("none", "auto"),
    "parallel_tool_calls": boolean(),
    "response_format": _only({"type": "text"}, "{'type': 'text'}"),
    "modalities": _only(["text"], "['text']"),
}


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object in a body.

    Raises:
      ApiError: it is no JSON object.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        found = json.loads(body, parse_constant=refuse)
        json.dumps(found, ensure_ascii=False).encode()  # half a character in `\\u` notation is no text
    except (ValueError, RecursionError) as error:  # bytes and text that are not UTF-8 are ValueErrors, too
        raise ApiError(400, f"the body is not JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is {shown(found)}, not an object")
    return found


def parse(
    body: Mapping[str, Any], *, chat: bool, models: tuple[str, ...], suggested: Mapping[str, Any]
) -> Asked:
    """Return what a request asks for.

    Args:
      body: the object that was sent.
      chat: whether it asks for a chat's next message, else for a completion.
      models: names that the model goes by.
      suggested: sampling settings for what the request leaves open.

    Raises:
      ApiError: a value is missing, of a wrong type, out of its range, or not supported.
    """
    body = {key: value for key, value in body.items() if value is not None}
    table = _CHAT if chat else _COMPLETION
    for key, value in body.items():
        if key not in table:
            raise ApiError(400, f"{shown(key)}: is not supported", param=key[:80], code="unknown_parameter")
        if not table[key].accepts(value):
            raise ApiError(400, f"{key}: is {shown(value)}, not {table[key].expected}", param=key)
    for key in ("model", "messages" if chat else "prompt"):
        if key not in body:
            raise ApiError(400, f"{key}: is missing", param=key)
    if body["model"] not in models:
        known = ", ".join(models)
        message = f"model {shown(body['model'])}: is not here; there is {known}"
        raise ApiError(404, message, param="model", code="model_not_found")
    top = _told(body, chat=chat)
    new = body.get("max_completion_tokens", body.get("max_tokens", None if chat else DEFAULT_NEW_TOKENS))
    return Asked(
        prompts=() if chat else _prompts(body["prompt"]),
        messages=tuple(map(_message, body["messages"])) if chat else (),
        choices=body.get("n", 1),
        max_new_tokens=new,
        sampling=_sampling(body, suggested),
        stop=_stops(body.get("stop", [])),
        stream=body.get("stream", False),
        usage=body.get("stream_options", {}).get("include_usage", False),
        top=top,
        ignore_eos=body.get("ignore_eos", False),
    )


def _told(body: Mapping[str, Any], *, chat: bool) -> int | None:
    if not chat:
        return body.get("logprobs")
    if "top_logprobs" in body and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
    return body.get("top_logprobs", 0) if body.get("logprobs") else None


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    one = isinstance(given, str) or isinstance(given[0], int)
    return tuple(each if isinstance(each, str) else tuple(each) for each in ([given] if one else given))


def _message(given: Mapping[str, Any]) -> dict[str, str]:
    content, role = given["content"], given["role"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": "system" if role == "developer" else role, "content": text}


def _stops(given: Any) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given)
    if "" in stops:
        raise ApiError(400, "stop: a stop text is empty", param="stop")
    return stops


def _sampling(body: Mapping[str, Any], suggested: Mapping[str, Any]) -> Sampling:
    stated = {key: body[key] for key in ("temperature", "top_p", "top_k", "min_p") if key in body}
    stated["top_k"] = max(0, stated.get("top_k", suggested.get("top_k", 0)))  # −1, too, stands for all
    stated["seed"] = body.get("seed", secrets.randbelow(SEED_LIMIT + 1))
    try:
        return Sampling(**{"temperature": 1.0, **suggested, **stated})
    except TwlaError as error:
        raise ApiError(400, str(error)) from None
