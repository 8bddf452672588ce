"""Describes the routes in OpenAPI 3.1, for clients that are generated and for tools that read such a description.

`protocol` checks requests; the tests compare what it accepts with what this description allows.
"""

from typing import Any

from twla_jax.limits import SEED_LIMIT
from twla_jax.serving.rows import MOST_TOP
from twla_jax.version import __version__

_Json = dict[str, Any]
_TEXT: _Json = {"type": "string", "maxLength": 4096}
_STOP: _Json = {**_TEXT, "minLength": 1}
_LONG: _Json = {"type": "string", "maxLength": 2**24}
_IDS: _Json = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "minItems": 1,
    "maxItems": 2**24,
}
_PART: _Json = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _LONG},
    "required": ["type", "text"],
}
_MESSAGE: _Json = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [_LONG, {"type": "array", "items": _PART, "maxItems": 4096}]},
    },
    "required": ["role", "content"],
}
_NEW: _Json = {"type": "integer", "minimum": 1, "maximum": 2**24}
_TOP: _Json = {"type": "integer", "minimum": 0, "maximum": MOST_TOP}
_COMMON: _Json = {
    "max_tokens": {**_NEW, "description": "a completion has 16 by default, a chat goes on to the limit"},
    "temperature": {
        "type": "number",
        "minimum": 0,
        "maximum": 2,
        "description": "0 takes the likeliest token",
    },
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 2**26, "description": "0 and -1 stand for all"},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 16},
    "seed": {"type": "integer", "minimum": 0, "maximum": SEED_LIMIT, "description": "choice i has seed + i"},
    "stop": {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": 16}]},
    "stream": {"type": "boolean"},
    "stream_options": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "ignore_eos": {"type": "boolean", "description": "go on past the model's end"},
    "frequency_penalty": {"const": 0},
    "presence_penalty": {"const": 0},
    "logit_bias": {"const": {}},
    "user": _TEXT,
    "metadata": {"type": "object"},
    "store": {"type": "boolean"},
    "service_tier": _TEXT,
    "safety_identifier": _TEXT,
    "prompt_cache_key": _TEXT,
}
_PROMPTS: _Json = {
    "anyOf": [
        _LONG,
        _IDS,
        {"type": "array", "items": _LONG, "minItems": 1, "maxItems": 64},
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": 64},
    ]
}
_COMPLETION: _Json = {
    "logprobs": _TOP,
    "best_of": {"const": 1},
    "echo": {"const": False},
    "suffix": {"const": ""},
}
_CHAT: _Json = {
    "max_completion_tokens": _NEW,
    "logprobs": {"type": "boolean"},
    "top_logprobs": _TOP,
    "tools": {"const": []},
    "tool_choice": {"enum": ["none", "auto"]},
    "parallel_tool_calls": {"type": "boolean"},
    "response_format": {"const": {"type": "text"}},
    "modalities": {"const": ["text"]},
}


def _request(required: _Json, optional: _Json) -> _Json:
    """Return the schema of a request: null is as if the key were not there, whatever the key."""
    may_be_null = {key: {"anyOf": [schema, {"type": "null"}]} for key, schema in optional.items()}
    properties = {"model": _TEXT, **required, **may_be_null}
    return {
        "type": "object",
        "properties": properties,
        "required": ["model", *required],
        "additionalProperties": {"type": "null"},
    }


def _object(**properties: Any) -> _Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _answer(kind: str, said: _Json) -> _Json:
    """Return the schema of an answer, whole or an event of a stream."""
    reasons = {"enum": ["stop", "length", None]}
    logprobs = {"type": ["object", "null"]}
    choice = _object(index={"type": "integer"}, **said, logprobs=logprobs, finish_reason=reasons)
    count = {"type": "integer", "minimum": 0}
    schema = _object(
        id={"type": "string"},
        object={"const": kind},
        created={"type": "integer"},
        model={"type": "string"},
        choices={"type": "array", "items": choice},
    )
    schema["properties"]["usage"] = _object(prompt_tokens=count, completion_tokens=count, total_tokens=count)
    return schema


_SAID: _Json = {
    "Completion": ("text_completion", {"text": {"type": "string"}}),
    "Chat": (
        "chat.completion",
        {
            "message": _object(
                role={"const": "assistant"}, content={"type": "string"}, refusal={"type": "null"}
            )
        },
    ),
    "ChatEvent": ("chat.completion.chunk", {"delta": {"type": "object"}}),
}
_SCHEMAS: _Json = {
    "CompletionRequest": _request({"prompt": _PROMPTS}, _COMMON | _COMPLETION),
    "ChatRequest": _request(
        {"messages": {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 4096}}, _COMMON | _CHAT
    ),
    **{name: _answer(*said) for name, said in _SAID.items()},
    "Model": _object(
        id={"type": "string"},
        object={"const": "model"},
        created={"type": "integer"},
        owned_by={"const": "twla"},
        max_model_len={"type": "integer"},
    ),
    "Error": _object(
        error=_object(
            message={"type": "string"},
            type={"type": "string"},
            param={"type": ["string", "null"]},
            code={"type": ["string", "null"]},
        )
    ),
}


def _schema(name: str) -> _Json:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


def _said(description: str, **content: Any) -> _Json:
    return {"description": description, "content": content} if content else {"description": description}


_ERRORS: _Json = {
    status: _said(why, **{"application/json": _schema("Error")})
    for status, why in {
        "400": "the request is wrong, or longer than the server's limit",
        "401": "the API key is missing or wrong",
        "403": "the server has no key and is called by a name that is not of this machine",
        "404": "there is no such model or route",
    }.items()
}


def _post(summary: str, request: str, answer: str, event: str) -> _Json:
    events = _schema(event) | {"example": "data: {…}\n\ndata: [DONE]\n\n"}
    late = {
        "408": "the body took too long",
        "413": "the body is too long",
        "415": "the body is not application/json",
        "429": "as many requests wait as may; Retry-After says when to ask again",
        "503": "the server is shutting down",
    }
    return {
        "post": {
            "operationId": request.removesuffix("Request").lower(),
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": _schema(request)}},
            "responses": {
                "200": _said(
                    "the answer; with stream, server-sent events",
                    **{"application/json": _schema(answer), "text/event-stream": events},
                ),
                **_ERRORS,
                **{
                    status: _said(why, **{"application/json": _schema("Error")})
                    for status, why in late.items()
                },
            },
        }
    }


def _get(name: str, summary: str, answer: _Json, *, open_to_all: bool = False, **more: Any) -> _Json:
    found = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": answer} | more.pop("responses", {}),
    }
    return {"get": found | ({"security": []} if open_to_all else {}) | more}


_JSON = "application/json"
_LIST = {
    "schema": _object(object={"const": "list"}, data={"type": "array", "items": _schema("Model")["schema"]})
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
DESCRIPTION: _Json = {
    "openapi": "3.1.0",
    "info": {
        "title": "twla serve",
        "version": __version__,
        "summary": "Completions and chats in the form of OpenAI's API.",
    },
    "security": [{"key": []}, {}],
    "paths": {
        "/v1/completions": _post("Continue prompts.", "CompletionRequest", "Completion", "Completion"),
        "/v1/chat/completions": _post("Answer a chat.", "ChatRequest", "Chat", "ChatEvent"),
        "/v1/models": _get(
            "models", "List the one model.", _said("the list", **{_JSON: _LIST}), responses=_ERRORS
        ),
        "/v1/models/{name}": _get(
            "model",
            "Describe the model.",
            _said("the model", **{_JSON: _schema("Model")}),
            responses=_ERRORS,
            parameters=[_NAME],
        ),
        "/metrics": _get(
            "metrics",
            "Report requests, tokens, slots and times for Prometheus.",
            _said("the metrics", **{"text/plain": {"schema": {"type": "string"}}}),
            responses=_ERRORS,
        ),
        "/health": _get(
            "health",
            "Say whether requests are taken.",
            _said("requests are taken"),
            responses={"503": _said("the server is shutting down or has failed")},
            open_to_all=True,
        ),
        "/openapi.json": _get("openapi", "Return this description.", _said("it"), open_to_all=True),
    },
    "components": {
        "schemas": _SCHEMAS,
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    },
}
