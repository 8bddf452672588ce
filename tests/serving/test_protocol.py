"""Requests: whatever is sent is understood or refused in one line; nothing else comes of it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twla_jax.inference.sampling import Sampling
from twla_jax.serving import protocol
from twla_jax.serving.protocol import ApiError

COMPLETION = {"model": "m", "prompt": "a"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS | st.sampled_from([*CHAT["messages"], {"type": "text", "text": "a"}, {"include_usage": True}]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(sorted({*protocol._COMPLETION, *protocol._CHAT})) | st.text(max_size=5)


def parse(body, *, chat=False, **suggested):
    return protocol.parse(body, chat=chat, models=("m",), suggested=suggested)


def outcome(call):
    """What a call returns, or the refusal that it raises."""
    try:
        return call()
    except ApiError as error:
        return error


@settings(max_examples=150, deadline=None)
@given(st.booleans(), st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_object_is_understood_or_refused(chat, changes):
    found = outcome(lambda: parse({**(CHAT if chat else COMPLETION), **changes}, chat=chat))
    if isinstance(found, ApiError):
        assert found.status in (400, 404)
        assert "\n" not in found.message
        assert len(found.message) < 400
        json.dumps(found.body)
    else:
        assert bool(found.messages) == chat
        assert all(isinstance(each["content"], str) for each in found.messages)
        assert 1 <= found.choices <= 16


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=30) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_refused(body):
    found = outcome(lambda: protocol.parse_json(body))
    assert isinstance(found, dict) or found.status == 400


def test_what_a_request_leaves_open_is_as_the_model_suggests():
    given = {"temperature": 0.3, "top_p": 0.8, "top_k": 5}
    asked = parse({**COMPLETION, "top_p": 0.5, "seed": 7}, **given).sampling
    assert asked == Sampling(temperature=0.3, top_p=0.5, top_k=5, seed=7)
    assert parse({**COMPLETION, "top_k": -1}, **given).sampling.top_k == 0
    plain = parse(COMPLETION).sampling
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)
    assert plain.seed != parse(COMPLETION).sampling.seed


def test_null_is_as_if_it_were_not_there():
    asked = parse({**COMPLETION, "stop": None, "max_tokens": None, "logprobs": None, "seed": 1})
    assert asked == parse({**COMPLETION, "seed": 1})
    assert asked.max_new_tokens == 16


@pytest.mark.parametrize(
    "key", ["tools", "response_format", "logit_bias", "echo", "best_of", "frequency_penalty"]
)
def test_what_is_not_done_is_refused_by_name(key):
    chat = key in protocol._CHAT
    with pytest.raises(ApiError, match=f"{key}: is .* not supported"):
        parse({**(CHAT if chat else COMPLETION), key: [{"a": 1}]}, chat=chat)
