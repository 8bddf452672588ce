"""A conversation gives what its whole text gives, keeps what was said, and survives an answer that is cut short."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from twla_jax.errors import TwlaError
from twla_jax.inference import conversation as conversations
from twla_jax.inference.conversation import Conversation
from twla_jax.inference.generation import generate
from twla_jax.inference.sampling import Sampling
from twla_jax.models.decoder import Decoder
from twla_jax.models.rope_settings import RopeScaling
from twla_jax.text import chat

from helpers.chat_tokenizer import chat_tokenizer

END = 3  # <end>


@pytest.fixture(scope="module")
def model(tiny_config):
    return Decoder(tiny_config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def expected(model, tokenizer, messages, count=6, **settings):
    """The answer by the whole text anew."""
    ids = chat.encode_chat(tokenizer, messages)
    row = generate(model, np.array([ids]), max_new_tokens=count, eos_token_ids=(END,), **settings)[0]
    return tokenizer.decode(row, skip_special_tokens=True)


def test_every_answer_is_that_to_the_whole_conversation(model, tokenizer):
    talk = Conversation(model, tokenizer, system="w9", max_new_tokens=6)
    messages = [{"role": "system", "content": "w9"}]
    for said in ("w1 w2", "w3", "w4 w5 w6"):
        messages.append({"role": "user", "content": said})
        answer = "".join(talk.answer(said))
        assert answer == expected(model, tokenizer, messages)
        messages.append({"role": "assistant", "content": answer})
        assert talk.messages == messages
    talk.reset()
    assert talk.messages == messages[:1]
    assert "".join(talk.answer("w3")) == expected(
        model, tokenizer, [*messages[:1], {"role": "user", "content": "w3"}]
    )


def test_only_what_is_new_is_read(model, tokenizer, monkeypatch):
    held = []
    fill = conversations.generation.fill
    monkeypatch.setattr(
        conversations.generation, "fill", lambda *a, **k: held.append(k["held"]) or fill(*a, **k)
    )
    talk = Conversation(model, tokenizer, max_new_tokens=60)  # which makes a cache with room for both
    list(talk.answer("w1 w2"))
    first = chat.encode_chat(tokenizer, talk.messages[:1])
    list(talk.answer("w3"))
    assert held[0] == 0
    assert held[1] >= len(first)  # and the answer, where its text has the same tokens


def test_keys_are_kept_only_on_one_side_of_where_longrope_changes(tiny_config, monkeypatch):
    scaling = RopeScaling(
        kind="longrope",
        original_max_position_embeddings=12,
        factors=(1.0,) * 7,
        long_factors=(4.0,) * 7,
    )
    model = Decoder(dataclasses.replace(tiny_config, rope_scaling=scaling), rngs=nnx.Rngs(0))
    held, fill = [], conversations.generation.fill
    monkeypatch.setattr(
        conversations.generation, "fill", lambda *a, **k: held.append(k["held"]) or fill(*a, **k)
    )
    kept = conversations.KeptText(model)
    settings = {"sampling": Sampling(), "key": jax.random.key(0), "eos_token_ids": ()}
    long = list(range(20))
    for ids in (long, [*long, 95, 96], long[:6], [*long[:6], 95], long):
        next(iter(kept.stream(ids, 100, **settings)))
    assert held == [0, 20, 0, 6, 0]


def test_an_answer_that_is_cut_short_is_kept_as_far_as_it_came(model, tokenizer):
    talk = Conversation(model, tokenizer, max_new_tokens=6)
    answer = talk.answer("w1 w2")
    begun = next(answer) + next(answer)
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": begun}
    said = [*talk.messages, {"role": "user", "content": "w3"}]
    assert "".join(talk.answer("w3")) == expected(model, tokenizer, said)


def test_an_interrupt_within_a_step_loses_nothing_but_the_cache(model, tokenizer, monkeypatch):
    talk = Conversation(model, tokenizer, max_new_tokens=6)
    step, calls = conversations.generation.step, []

    def interrupted(*arguments):
        calls.append(step(*arguments))  # takes the cache's memory
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(conversations.generation, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(talk.answer("w1"))
    monkeypatch.undo()
    assert len(talk.messages) == 2
    said = [*talk.messages, {"role": "user", "content": "w3"}]
    assert "".join(talk.answer("w3")) == expected(model, tokenizer, said)


def test_samples_differ_from_answer_to_answer_and_follow_the_seed(model, tokenizer):
    def answers(seed):
        talk = Conversation(model, tokenizer, max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=seed))
        first = "".join(talk.answer("w1"))
        talk.reset()
        return first, "".join(talk.answer("w1"))

    assert answers(0) == answers(0) != answers(1)
    assert answers(0)[0] != answers(0)[1]


def test_a_conversation_ends_with_the_models_positions(model, tokenizer, tiny_config):
    short = dataclasses.replace(tiny_config, max_position_embeddings=16)
    talk = Conversation(Decoder(short, rngs=nnx.Rngs(0)), tokenizer, max_new_tokens=100)
    answer = "".join(talk.answer("w1"))
    ids = chat.encode_chat(tokenizer, talk.messages[:1])
    assert len(answer.split("w")) - 1 <= 16 - len(ids)
    with pytest.raises(TwlaError, match="and the model 16 positions"):
        list(talk.answer("w1 w2 w3"))
    assert len(talk.messages) == 2


def test_a_model_without_a_template_is_refused_at_once(model):
    with pytest.raises(TwlaError, match="has no chat template"):
        Conversation(model, chat_tokenizer(template=None))
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(TwlaError, match=r"\(system, user\): no system role"):
        Conversation(model, chat_tokenizer(template=refuses), system="w1")
