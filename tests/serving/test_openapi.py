"""The description of the routes: as the standard has it, and true to what the server takes."""

import asyncio
import json
import types

import jsonschema
import openapi_spec_validator
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twla_jax.serving import protocol
from twla_jax.serving.app import Service, ServiceSettings
from twla_jax.serving.openapi import DESCRIPTION
from twla_jax.serving.protocol import ApiError
from twla_jax.serving.settings import EngineSettings

BODIES = {
    "CompletionRequest": {"model": "m", "prompt": "a"},
    "ChatRequest": {"model": "m", "messages": [{"role": "user", "content": "a"}]},
}
# Whole numbers written with a point are integers to JSON Schema, and not to this server.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(0.1, 0.9)
    | st.floats(1.1, 1.9)
    | st.sampled_from([-1, 0, 1, 2, 16, 17, 20, 21, "", "auto", "none"])
)
VALUES = st.recursive(
    SCALARS | st.sampled_from([{}, [], {"type": "text"}, ["text"], {"include_usage": True}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


def allows(name, body):
    schema = {"$ref": f"#/components/schemas/{name}", "components": DESCRIPTION["components"]}
    return jsonschema.Draft202012Validator(schema).is_valid(body)


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
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_it_allows_what_the_server_takes(name, data):
    schema = DESCRIPTION["components"]["schemas"][name]
    key = data.draw(st.sampled_from([*schema["properties"], "unknown"]))
    value = data.draw(VALUES)
    body = {**BODIES[name], key: value}
    if key == "top_logprobs" and value is not None:  # which needs another key, as no schema here says
        body["logprobs"] = True
    if key == "stop" and "" in (value if isinstance(value, list) else [value]):
        return  # an empty stop text, which the server names by itself
    if key == "model" and value != "m":
        return
    assert allows(name, body) == accepts(name, body)
