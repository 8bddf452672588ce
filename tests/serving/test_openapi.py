"""The description of the routes: as the standard has it, and true to what the server takes."""

import asyncio
import json
import types

import jsonschema
import openapi_spec_validator
import pytest

from twla_jax.serving import protocol
from twla_jax.serving.app import Service
from twla_jax.serving.openapi import DESCRIPTION
from twla_jax.serving.protocol import ApiError
from twla_jax.serving.settings import EngineSettings, ServiceSettings

BODIES = {
    "CompletionRequest": {"model": "m", "prompt": "a"},
    "ChatRequest": {"model": "m", "messages": [{"role": "user", "content": "a"}]},
}
# No whole numbers written with a point, which are integers to JSON Schema and not to this server.
SCALARS = [None, False, True, -2, -1, 0, 1, 2, 15, 16, 17, 20, 21, 2**24, 2**31, 2**33, 2**40, 0.5, 1.5, 2.5]
SCALARS += ["", "a", "auto", "none", "m"]
LISTS = [
    [],
    [1],
    ["a"],
    [""],
    [True],
    [-1],
    [1.5],
    ["a", 1],
    [[1, 2]],
    [[]],
    [["a"]],
    ["text"],
    ["a"] * 17,
    ["a"] * 65,
]
OBJECTS = [
    {},
    {"type": "text"},
    {"include_usage": True},
    {"include_usage": 1},
    {"role": "user", "content": "a"},
]
MESSAGES = [
    [{"role": role, "content": content}]
    for role in ("user", "developer", "robot", 1)
    for content in (
        "a",
        1,
        [],
        [{"type": "text", "text": "a"}],
        [{"type": "image", "text": "a"}],
        [{"type": "text"}],
    )
]
VALUES = [*SCALARS, *LISTS, *OBJECTS, *([each] for each in OBJECTS), *MESSAGES]


def validator(name):
    schema = {"$ref": f"#/components/schemas/{name}", "components": DESCRIPTION["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid


def accepts(name, body):
    try:
        protocol.parse(body, chat=name == "ChatRequest", models=("m",), suggested={})
    except ApiError:
        return False
    return True


def test_it_is_openapi():
    openapi_spec_validator.validate(json.loads(json.dumps(DESCRIPTION)))


def test_it_names_every_route_and_needs_no_key():
    engine = types.SimpleNamespace(settings=EngineSettings(), config=types.SimpleNamespace(eos_token_ids=()))
    tokenizer = types.SimpleNamespace(chat_template=None)
    app = Service(engine, tokenizer, ServiceSettings(model="m", key="secret")).app()
    assert {(route.path_format, *sorted(route.methods - {"HEAD"})) for route in app.routes} == {
        (path, method.upper()) for path, methods in DESCRIPTION["paths"].items() for method in methods
    }
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/openapi.json", "query_string": b"", "headers": []}
    asyncio.run(app(scope, None, send))
    assert (sent[0]["status"], json.loads(sent[1]["body"])) == (200, DESCRIPTION)


def test_it_names_every_key_of_a_request():
    schemas = DESCRIPTION["components"]["schemas"]
    assert schemas["CompletionRequest"]["properties"].keys() == protocol._COMPLETION.keys()
    assert schemas["ChatRequest"]["properties"].keys() == protocol._CHAT.keys()


@pytest.mark.parametrize("name", BODIES)
def test_it_allows_what_the_server_takes(name):
    allows, differ = validator(name), []
    for key in (*DESCRIPTION["components"]["schemas"][name]["properties"], "unknown"):
        for value in VALUES:
            body = {**BODIES[name], key: value}
            if key == "top_logprobs" and value is not None:  # which needs another key, as no schema here says
                body["logprobs"] = True
            other_model = key == "model" and value != "m"
            if not other_model and allows(body) != accepts(name, body):
                differ.append((key, value))
    assert differ == []
