"""Which prompts are read together."""

import pytest

from twla_jax.serving.reading import prompts_together
from twla_jax.serving.requests import Generation, Ticket
from twla_jax.serving.schedule import Schedule
from twla_jax.serving.settings import EngineSettings


def tickets(*lengths):
    return [Ticket(generation=Generation(prompt=(0,) * n, max_new_tokens=1), sink=print) for n in lengths]


@pytest.mark.parametrize(
    ("waiting", "read"), [(1, 1), (2, 2), (3, 2), (7, 2), (8, 8), (9, 9), (15, 15), (16, 16), (20, 16)]
)
def test_the_larger_call_reads_what_fills_half_of_it(waiting, read):
    schedule = Schedule(20, lambda length: 4, {4: (2, 16)})
    schedule.waiting.extend(tickets(*[3] * waiting))
    slots = schedule.read_next()
    assert list(slots) == list(range(read))
    assert len(schedule.waiting) == waiting - read


def test_prompts_of_one_width_are_read_together_and_the_first_is_among_them():
    schedule = Schedule(8, lambda length: 4 if length <= 4 else 16, {4: (4,), 16: (2,)})
    schedule.waiting.extend(asked := tickets(5, 1, 16, 2, 9))
    assert list(schedule.read_next().values()) == [asked[0], asked[2]]
    assert list(schedule.read_next().values()) == [asked[1], asked[3]]
    assert list(schedule.read_next().values()) == [asked[4]]
    assert not schedule.read_next()


def test_a_call_for_many_is_not_made_for_one():
    schedule = Schedule(8, lambda length: 4, {4: (8,)})
    schedule.waiting.extend(tickets(1))
    assert len(schedule.read_next()) == 1
    schedule.waiting.extend(tickets(1, 2))
    assert [len(schedule.read_next()) for _ in range(2)] == [2, 0]


@pytest.mark.parametrize(
    ("slots", "expected"), [(16, {64: (16,), 512: (2,)}), (64, {64: (16, 64), 512: (2,)}), (1, {})]
)
def test_only_the_shortest_prompts_have_a_larger_call_and_only_where_slots_are_many(
    tiny_model, slots, expected
):
    settings = EngineSettings(together=1024, slots=slots)
    assert prompts_together(settings, (64, 512), tiny_model) == expected
