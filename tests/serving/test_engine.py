"""The engine: every answer is the one that its prompt gets alone; what ends, waits, is cancelled and is refused."""

import dataclasses
import queue
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from jax.errors import JaxRuntimeError

from twla_jax.core.tensors import TernaryTensor
from twla_jax.errors import TwlaError
from twla_jax.inference.generation import generate
from twla_jax.inference.packed_decoder import prepare_for_inference
from twla_jax.inference.sampling import Sampling
from twla_jax.models import sharding
from twla_jax.models.decoder import Decoder
from twla_jax.models.rope_settings import RopeScaling
from twla_jax.models.sites import set_activation_bits
from twla_jax.serving import slots
from twla_jax.serving.engine import Engine
from twla_jax.serving.requests import Busy, Generation, check
from twla_jax.serving.rows import row
from twla_jax.serving.settings import EngineSettings

from helpers.compiled import compiled_programs
from helpers.overflowing import overflowing

FILTERS = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01}


@pytest.fixture(scope="module")
def model(tiny_config):
    return Decoder(tiny_config, rngs=nnx.Rngs(0))


def started(model, **settings):
    few = {"slots": 8, "max_length": 40, "steps": 3, "chunks": (4, 16), "together": 32, "ahead": True}
    return Engine(model, EngineSettings(**few | settings))


@pytest.fixture(scope="module")
def engine(model):
    engine = started(model)
    yield engine
    engine.close()


def prompt(seed, length):
    return tuple(np.random.default_rng(seed).integers(0, 97, length).tolist())


def requests(count):
    """Prompts of all lengths, greedy, sampled and filtered, each with a seed of its own."""
    kinds = ({}, {"temperature": 1.0}, FILTERS)
    return [
        Generation(
            prompt=prompt(i, 1 + 5 * i % 23),
            max_new_tokens=1 + 7 * i % 16,
            sampling=Sampling(seed=i, **kinds[i % 3]),
        )
        for i in range(count)
    ]


def offline(model, asked):
    tokens = generate(
        model,
        np.asarray([asked.prompt]),
        max_new_tokens=asked.max_new_tokens,
        sampling=asked.sampling,
        eos_token_ids=asked.ends,
    )
    return tokens[0].tolist()


class Answer:
    """Collects what a request is told."""

    def __init__(self):
        self.tokens, self.told, self.reason, self.over = [], [], None, threading.Event()
        self.pieces = queue.Queue()

    def __call__(self, delivery):
        assert self.reason is None
        self.tokens += delivery.tokens
        self.told.append(delivery.told)
        self.pieces.put(delivery)
        if delivery.reason is not None:
            self.reason = delivery.reason
            self.over.set()

    def wait(self):
        assert self.over.wait(120)
        return self.tokens


def answers(engine, asked):
    found = [Answer() for _ in asked]
    for each, answer in zip(asked, found, strict=True):
        engine.submit(each, answer)
    for answer in found:
        answer.wait()
    return found


def test_every_answer_is_the_one_that_its_prompt_gets_alone(engine, model):
    compiled = {name: compiled_programs(each) for name, each in engine.programs.items()}
    of_prompts = {"read": 4, "prefill": 1, "admit": 1, "forget": 1, "move": 1}
    assert compiled == {"steps": 2, "fixed_steps": 4, **of_prompts}
    asked = requests(24)
    for each, found in zip(asked, answers(engine, asked), strict=True):
        assert found.tokens == offline(model, each)
        assert found.reason == "length"
    assert compiled == {name: compiled_programs(each) for name, each in engine.programs.items()}
    assert engine.running == engine.waiting == 0


def with_one_group_a_row(model):
    """The kernels' layout has no place for the groups of 16 that the model has."""

    def first(kernel):
        one = {"alpha": kernel.alpha[..., :1], "mu": kernel.mu[..., :1], "group_size": kernel.in_features}
        return dataclasses.replace(kernel, **one)

    return jax.tree.map(
        lambda leaf: first(leaf) if isinstance(leaf, TernaryTensor) else leaf,
        model,
        is_leaf=lambda leaf: isinstance(leaf, TernaryTensor),
    )


@pytest.mark.parametrize("form", ["ternary", "packed, int8 cache"])
def test_quantised_and_packed_models_answer_as_they_do_offline(tiny_ternary, form):
    # At 16 bits: codes of fewer may lie on the edge between two levels.
    model = jax.tree.map(jax.numpy.asarray, set_activation_bits(with_one_group_a_row(tiny_ternary), 16))
    model = model if form == "ternary" else prepare_for_inference(model, unpack=False)
    cache = {"cache_dtype": None if form == "ternary" else "int8"}
    engine = started(model, chunks=(8,), slots=2, max_length=8, rows=(2,), **cache)
    asked = [Generation(prompt=prompt(i, 3), max_new_tokens=5) for i in range(3)]
    found = answers(engine, asked)
    engine.close()
    rows = generate(
        model, np.asarray([each.prompt for each in asked]), max_new_tokens=5, eos_token_ids=(), **cache
    )
    assert [each.tokens for each in found] == rows.tolist()


def test_an_end_token_ends_the_answer_and_log_probabilities_are_of_the_whole_vocabulary(engine, model):
    asked = Generation(prompt=prompt(1, 9), max_new_tokens=12)
    whole = offline(model, asked)
    end = whole[5]
    first = whole.index(end) + 1
    ended = Generation(prompt=asked.prompt, max_new_tokens=12, ends=(96, end), logprobs=True)
    (found,) = answers(engine, [ended])
    assert (found.tokens, found.reason) == (whole[:first], "stop")
    text = np.asarray([[*asked.prompt, *whole]])
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, text)[0], np.float64)
    rows = logits[len(asked.prompt) - 1 :][:first]
    expected = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    chosen, tokens, top = (np.concatenate(parts) for parts in zip(*found.told, strict=True))
    np.testing.assert_allclose(chosen, expected[np.arange(first), whole[:first]], atol=1e-4)
    np.testing.assert_allclose(top, -np.sort(-expected, axis=-1)[:, :20], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected, tokens, axis=1), top, atol=1e-4)


def test_a_cancelled_request_frees_its_slot_and_the_others_do_not_notice(engine, model):
    asked = [Generation(prompt=prompt(i, 4), max_new_tokens=36) for i in range(12)]
    found = [Answer() for _ in asked]
    tickets = [engine.submit(each, answer) for each, answer in zip(asked, found, strict=True)]
    found[3].pieces.get(timeout=60)
    for i in (3, 11):  # one that runs, one that waits
        engine.cancel(tickets[i])
    for i in set(range(12)) - {3, 11}:
        assert found[i].wait() == offline(model, asked[i])
    assert (found[3].reason, found[11].reason) == (None, None)
    assert engine.running == engine.waiting == 0


@pytest.mark.parametrize("chunk", [8, 4])
def test_a_request_whose_logits_are_not_finite_fails_alone(tiny_model, chunk):
    """Token 5 overflows: the next prompt goes through the call or the row that it was read in, or into its slot."""
    model = overflowing(tiny_model, 5)
    alone = Generation(prompt=prompt(3, 6), max_new_tokens=6)
    assert 5 not in alone.prompt
    engine = started(model, slots=2, chunks=(chunk,), max_length=24, rows=(2,))
    asked = [Generation(prompt=(1, 5, 2, 3, 4, 6, 7, 8), max_new_tokens=6), *[alone] * 5]
    failed, *others = answers(engine, asked)
    engine.close()
    assert (failed.tokens, failed.reason) == ([], "failed")
    for each in others:
        assert (each.tokens, each.reason) == (offline(model, alone), "length")


def test_with_one_shape_not_a_bit_depends_on_other_requests(model):
    engine = started(model, slots=4, chunks=(16,), max_length=16, one_shape=True)
    assert engine.fixed == {}
    *others, asked = (
        dataclasses.replace(each, prompt=each.prompt[:8], max_new_tokens=8, logprobs=True)
        for each in requests(6)
    )
    (alone,) = answers(engine, [asked])
    crowd = answers(engine, [*others, asked])
    engine.close()
    assert crowd[-1].tokens == alone.tokens
    told = [jax.tree.map(lambda *parts: np.concatenate(parts), *each.told) for each in (alone, crowd[-1])]
    jax.tree.map(np.testing.assert_array_equal, *told)


@pytest.mark.parametrize("form", ["float", pytest.param("packed", marks=pytest.mark.slow)])
def test_a_model_on_a_mesh_answers_as_on_one_device(form, tiny_config, tiny_ternary):
    mesh = sharding.make_mesh("model=2")
    if form == "float":  # with heads that the mesh divides
        model = Decoder(dataclasses.replace(tiny_config, num_heads=4, num_kv_heads=2), rngs=nnx.Rngs(0))
        split = sharding.place(model, mesh)
    else:
        model = jax.tree.map(jax.numpy.asarray, set_activation_bits(with_one_group_a_row(tiny_ternary), 16))
        split = prepare_for_inference(model, mesh=mesh)
    engine = started(split, slots=2, chunks=(4,), max_length=12, rows=(2,), together=0)
    asked = [Generation(prompt=prompt(i, 3 + 2 * i), max_new_tokens=3) for i in range(3)]
    found = answers(engine, asked)
    engine.close()
    assert [each.tokens for each in found] == [offline(model, each) for each in asked]


def test_requests_are_not_split_over_devices(tiny_model):
    with pytest.raises(TwlaError, match="data=2: requests are not split over devices"):
        Engine(sharding.place(tiny_model, sharding.make_mesh("data=2")))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=5)])
def test_a_token_after_which_nothing_is_finite_is_the_last(tiny_model, sampling):
    asked = Generation(prompt=prompt(3, 4), max_new_tokens=8, sampling=sampling)
    whole = offline(tiny_model, asked)
    model = overflowing(tiny_model, whole[3])
    engine = started(model, slots=2, chunks=(8,), max_length=24, rows=(2,))
    (found,) = answers(engine, [asked])
    engine.close()
    assert (found.tokens, found.reason) == (whole[: whole.index(whole[3]) + 1], "failed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "no token at all"),
        ({"prompt": (97,)}, "token id 97"),
        ({"prompt": (1,) * 39, "max_new_tokens": 2}, "41, above the limit 40"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"ends": tuple(range(9))}, "at most 8 tokens"),
        ({"ends": (2**32 - 1,)}, "must be token ids"),
        ({"sampling": Sampling(repetition_penalty=1.1)}, "repetition_penalty"),
    ],
)
def test_what_cannot_be_generated_is_named(engine, changes, message):
    with pytest.raises(TwlaError, match=message):
        engine.submit(Generation(**{"prompt": (1,), "max_new_tokens": 1, **changes}), Answer())


def test_a_model_may_have_many_end_tokens(tiny_config):
    config = dataclasses.replace(tiny_config, eos_token_ids=tuple(range(12)))
    ends = (*config.eos_token_ids, 50)  # with one of a chat
    check(Generation(prompt=(1,), max_new_tokens=1, ends=ends), config, 40)
    held = row(Sampling(), limit=1, ends=ends, told=False, config=config).ends
    assert set(ends) <= set(held[0].tolist())


def test_what_will_never_have_a_place_is_a_mistake(engine):
    asked = [(Generation(prompt=(1, 2), max_new_tokens=1), Answer())]
    with pytest.raises(TwlaError, match="73 answers are asked for at once; there are places for 72"):
        engine.submit_all(asked * 73)


def test_memory_that_is_too_small_for_all_slots_is_told_with_what_helps(model, monkeypatch):
    full = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    monkeypatch.setattr(slots, "empty_slots", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(TwlaError, match=r"too small .* lower slots or max_length, or .*--kv-cache int8"):
        started(model)


def test_an_answer_lies_on_one_side_of_where_longrope_changes(tiny_config):
    scaling = RopeScaling(kind="longrope", original_max_position_embeddings=10)
    config = dataclasses.replace(tiny_config, rope_scaling=scaling)
    for length, new in ((3, 8), (10, 1), (11, 20)):
        check(Generation(prompt=(1,) * length, max_new_tokens=new), config, 40)
    for length, new, most in ((3, 9, 8), (10, 2, 1)):
        with pytest.raises(TwlaError, match=f"pass 10, where LongRoPE .* ask for {most} at most"):
            check(Generation(prompt=(1,) * length, max_new_tokens=new), config, 40)


def test_what_has_no_place_is_refused_and_closing_ends_all(engine):
    long = Generation(prompt=(1, 2), max_new_tokens=38)
    found = [Answer() for _ in range(72)]
    engine.submit_all([(long, each) for each in found])
    with pytest.raises(Busy) as refusal:
        engine.submit_all([(long, Answer())] * 9)
    assert refusal.value.retry_after >= 1
    found[0].pieces.get(timeout=60)
    engine.close()
    assert {each.reason for each in found} <= {"length", "aborted"}
    assert found[71].reason == "aborted"
    with pytest.raises(Busy) as refusal:
        engine.submit(long, Answer())
    assert refusal.value.retry_after is None
