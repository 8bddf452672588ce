"""The server, as OpenAI's own client sees it: answers are the offline ones; mistakes, limits, leaving and stopping."""

import asyncio
import concurrent.futures
import http.client
import json
import threading
import time
import types

import numpy as np
import openai
import pytest

from twla_jax.inference import generation
from twla_jax.inference.sampling import Sampling
from twla_jax.inference.text_generation import stream_text
from twla_jax.jobs import loading
from twla_jax.serving.app import Service
from twla_jax.serving.engine import Engine
from twla_jax.serving.server import Server, listen
from twla_jax.serving.settings import EngineSettings, ServiceSettings
from twla_jax.text import chat as chats

KEY = "open-sesame"
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SAMPLED = {"temperature": 0.9, "top_p": 0.9}


@pytest.fixture(scope="module")
def loaded(stories_model):
    model, tokenizer = loading.load(stories_model)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@pytest.fixture(scope="module")
def engine(loaded):
    settings = EngineSettings(slots=8, max_length=512, queue=16, steps=4, chunks=(64,))
    engine = Engine(loaded[0], settings)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine, loaded):
    """A server in a thread; the address of it."""
    settings = ServiceSettings(model="stories", key=KEY, max_body=4096)
    server = Server(Service(engine, loaded[1], settings), grace=60)
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    server.address, server.thread = listening.getsockname(), thread
    yield server
    server.should_exit = True
    thread.join(60)
    listening.close()


@pytest.fixture(scope="module")
def client(server):
    host, port = server.address
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def offline(loaded, prompt, count, stop=(), ends=None, **sampling):
    """The text that the library gives for a prompt alone."""
    pieces = stream_text(
        *loaded, prompt, max_new_tokens=count, sampling=Sampling(**sampling), stop=stop, eos_token_ids=ends
    )
    return "".join(piece for _, piece in pieces)


def complete(client, prompt="Once upon a time", **settings):
    return client.completions.create(**{"model": "stories", "prompt": prompt, "temperature": 0, **settings})


def raw(server, method, path, body=None, **headers):
    """The status, headers and body of a request that no client would make."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json", **headers}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    found = response.status, response.headers, response.read()
    connection.close()
    return found


def test_a_completion_is_the_offline_text_with_its_usage(client, loaded):
    found = complete(client, max_tokens=12)
    assert found.choices[0].text == offline(loaded, "Once upon a time", 12)
    assert found.choices[0].finish_reason == "length"
    prompt = len(loaded[1]("Once upon a time")["input_ids"])
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, 12)
    assert found.usage.total_tokens == prompt + 12


def test_several_prompts_and_choices_each_have_their_seed(client, loaded):
    ids = loaded[1]("The dog")["input_ids"]
    found = complete(client, [[*ids], [5, 6, 7]], max_tokens=8, n=2, seed=3, **SAMPLED)
    texts = [choice.text for choice in found.choices]
    assert texts == [offline(loaded, p, 8, seed=s, **SAMPLED) for p in (ids, [5, 6, 7]) for s in (3, 4)]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]


def test_the_seed_after_the_last_is_the_first(client, loaded):
    found = complete(client, "The dog", max_tokens=8, n=2, seed=2**31 - 1, **SAMPLED)
    texts = [offline(loaded, "The dog", 8, seed=seed, **SAMPLED) for seed in (2**31 - 1, 0)]
    assert [choice.text for choice in found.choices] == texts


def test_more_answers_than_there_are_places_are_a_mistake(client):
    with pytest.raises(openai.BadRequestError, match="there are places for 24 in all"):
        complete(client, ["The", "dog"], n=16)


def test_a_stream_adds_up_to_the_whole(client, loaded):
    events = list(
        complete(
            client, max_tokens=20, stream=True, seed=5, stream_options={"include_usage": True}, **SAMPLED
        )
    )
    text = "".join(event.choices[0].text for event in events[:-1])
    assert text == offline(loaded, "Once upon a time", 20, seed=5, **SAMPLED)
    assert len(events) > 4
    assert [event.choices[0].finish_reason for event in events[-3:-1]] == [None, "length"]
    assert (events[-1].choices, events[-1].usage.completion_tokens) == ([], 20)


def test_a_chat_goes_through_the_template(client, loaded):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    ids = chats.encode_chat(loaded[1], messages)
    ends = chats.ends_of_answer(loaded[1], loaded[0].config.eos_token_ids)
    expected = offline(loaded, ids, 24, ends=ends, **SAMPLED)
    chat = {"model": "stories", "messages": messages, "max_tokens": 24, "seed": 0, **SAMPLED}
    found = client.chat.completions.create(**chat)
    assert (found.choices[0].message.role, found.choices[0].message.content) == ("assistant", expected)
    assert found.usage.prompt_tokens == len(ids)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chat["messages"][1]["content"] = parts
    events = list(client.chat.completions.create(**chat, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == expected


def test_a_stop_text_ends_the_answer_before_it(client, loaded):
    whole = offline(loaded, "Once upon a time", 40)
    stop = whole[20:24]
    for settings in ({}, {"stream": True}):
        found = complete(client, max_tokens=40, stop=[stop, "never"], **settings)
        choices = [event.choices[0] for event in found] if settings else found.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_log_probabilities_are_of_the_tokens(client, loaded):
    model, tokenizer = loaded
    found = complete(client, max_tokens=6, logprobs=3).choices[0]
    ids = tokenizer("Once upon a time")["input_ids"]
    new = generation.generate(model, np.asarray([ids]), max_new_tokens=6)[0]
    logits = np.asarray(model(np.asarray([[*ids, *new]])), np.float64)[0, len(ids) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.logprobs.token_logprobs, expected.max(-1), atol=1e-3)
    assert [len(top) for top in found.logprobs.top_logprobs] == [3] * 6
    assert found.logprobs.tokens == [tokenizer.decode([token]) for token in new]
    assert found.text[found.logprobs.text_offset[3] :].startswith(found.logprobs.tokens[3])
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"model": "stories", "messages": messages, "max_tokens": 4, "temperature": 0}
    rows = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    for row in rows:
        assert row.top_logprobs[0].token == row.token
        assert row.top_logprobs[0].logprob == row.logprob >= row.top_logprobs[1].logprob
        assert bytes(row.bytes).decode() == row.token


def many_clients(client, loaded, count):
    """Asks `count` times at once; every answer must be the offline one."""
    prompts = ["Once upon a time", "The dog", "Lily and Tom went to the park. They"]
    asked = [
        (prompts[i % 3], {"max_tokens": 3 + 5 * i % 30, "seed": i, **({} if i % 2 else SAMPLED)})
        for i in range(count)
    ]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda each: complete(client, each[0], **each[1]).choices[0].text, asked))
    for (prompt, settings), text in zip(asked, found, strict=True):
        options = {"temperature": 0, **settings}
        new = options.pop("max_tokens")
        assert text == offline(loaded, prompt, new, **options)


def test_sixteen_clients_each_get_the_offline_answer(client, loaded):
    many_clients(client, loaded, 16)


@pytest.mark.slow
def test_sixty_four_clients_each_get_the_offline_answer(loaded):
    model, tokenizer = loaded
    engine = Engine(model, EngineSettings(slots=64, max_length=128))
    server = Server(Service(engine, tokenizer, ServiceSettings(model="stories")), grace=60)
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        host, port = listening.getsockname()
        with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
            many_clients(client, loaded, 64)
        server.should_exit = True
        thread.join(60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "no token at all"),
        ({"prompt": [[511], [512]]}, "token id 512"),
        ({"prompt": []}, "prompt: is a list of 0"),
        ({"temperature": -1}, "temperature: is -1, not a number from 0 to 2"),
        ({"max_tokens": 10**6}, "above the limit 512"),
        ({"prompt": [1] * 512}, "the prompt has 512 tokens"),
        ({"stop": ["a", ""]}, "a stop text is empty"),
        ({"seed": -1}, "seed: is -1"),
        ({"presence_penalty": 0.5}, "presence_penalty: is 0.5, not 0"),
        ({"extra_body": {"beam_width": 4}}, "'beam_width': is not supported"),
    ],
)
def test_a_wrong_request_is_named(client, changes, message):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, **{"max_tokens": 1, **changes})
    assert message in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"


def test_another_model_and_another_key_are_refused(client, server):
    with pytest.raises(openai.NotFoundError, match="there is stories"):
        complete(client, model="gpt-5")
    for key in ("sesame", "open-sesame-", "x" * 5000):
        with (
            openai.OpenAI(base_url=client.base_url, api_key=key, max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()
    assert [each.id for each in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").id == "stories"
    assert raw(server, "GET", "/health", authorization="")[0] == 200
    assert raw(server, "GET", "/metrics", authorization="")[0] == 401
    assert raw(server, "GET", "/metrics", authorization="Bearer ü".encode())[0] == 401


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b'{"model": "stories", "prompt": "\\ud800"}', {}, 400),
        (b'{"model": "stories", "prompt": "\xff"}', {}, 400),
        (b'{"model": "stories", "prompt": "a", "temperature": NaN}', {}, 400),
        (b"[" * 4000, {}, 400),
        (b'{"prompt": "a"}', {}, 400),
        (b'{"model": "stories"}', {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b" " * 4097, {}, 413),
        (iter([b" " * 3000] * 2), {}, 413),
    ],
)
def test_a_malformed_or_oversized_body_is_refused(server, body, headers, status):
    found, _, answer = raw(server, "POST", "/v1/completions", body, **headers)
    assert found == status
    assert json.loads(answer)["error"]["message"]


def test_other_routes_are_not_there(server):
    for method, path, status in (
        ("GET", "/v1/files", 404),
        ("GET", "/../etc/passwd", 404),
        ("DELETE", "/v1/models/stories", 405),
        ("GET", "/v1/completions", 405),
    ):
        found, _, answer = raw(server, method, path)
        assert (found, "error" in json.loads(answer)) == (status, True)


def test_too_many_requests_are_told_to_come_again(client, engine):
    with (
        complete(client, [[1]] * 24, max_tokens=400, stream=True),
        pytest.raises(openai.RateLimitError) as error,
    ):
        complete(client, [[1]] * 24, max_tokens=1)
    assert int(error.value.response.headers["retry-after"]) >= 1
    until(lambda: engine.running == engine.waiting == 0)


def test_more_answers_than_there_will_ever_be_places_for_are_refused(client):
    with pytest.raises(
        openai.BadRequestError, match="25 answers are asked for at once; there are places for 24"
    ):
        complete(client, [[1]] * 25, max_tokens=1)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:8000", 200), ("[::1]", 200), ("", 200)]
    + [
        (name, 403)
        for name in ("evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io:80", ":8000x")
    ],
)
def test_without_a_key_only_names_of_this_machine_are_answered(host, status):
    settings = ServiceSettings(model="m", hosts=("127.0.0.1", "[::1]", "localhost"))
    engine = types.SimpleNamespace(settings=EngineSettings(), config=types.SimpleNamespace(eos_token_ids=()))
    app = Service(engine, types.SimpleNamespace(chat_template=None), settings).app()
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "query_string": b""}
    asyncio.run(app({**scope, "headers": [(b"host", host.encode())]}, None, send))
    assert sent[0]["status"] == status


def metric(server, name):
    text = raw(server, "GET", "/metrics")[2].decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_leaves_frees_its_slot(client, server, engine):
    before = metric(server, "twla_cancelled_total")
    stream = complete(client, max_tokens=500, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        complete(client, max_tokens=500, extra_body={"ignore_eos": True}, timeout=0.05)
    until(lambda: metric(server, "twla_cancelled_total") == before + 2)
    until(lambda: engine.running == engine.waiting == 0)
    assert metric(server, "twla_slots") == 8
    assert metric(server, "twla_first_token_seconds_count") <= metric(server, "twla_new_tokens_total")


def test_a_server_that_stops_finishes_its_streams(client, server, loaded):
    stream = iter(complete(client, max_tokens=60, stream=True, extra_body={"ignore_eos": True}))
    text = next(stream).choices[0].text
    server.should_exit = True
    rest = list(stream)
    assert text + "".join(event.choices[0].text for event in rest) == offline(
        loaded, "Once upon a time", 60, ends=()
    )
    assert rest[-1].choices[0].finish_reason == "length"
    server.thread.join(60)
    assert not server.thread.is_alive()
    with pytest.raises(openai.APIConnectionError):
        complete(client, max_tokens=1)
