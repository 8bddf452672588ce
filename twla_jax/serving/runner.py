"""Runs on the device what an engine needs: holds the programs, and the arrays that they pass on.

All are compiled at the start: loops of steps for each number of rows, the reading of one prompt and of several for each
length, and what moves a request to another slot.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from twla_jax.devices import on_device
from twla_jax.errors import TwlaError
from twla_jax.inference.sampling import Sampling
from twla_jax.models.arguments import require_model
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache
from twla_jax.serving import slots as device
from twla_jax.serving.placement import mesh_of, shardings
from twla_jax.serving.programs import compile_together, jitted
from twla_jax.serving.reading import prompts_together
from twla_jax.serving.requests import Generation
from twla_jax.serving.rows import Made, Rows, row, together
from twla_jax.serving.settings import EngineSettings

CALL_SECONDS = 0.04  # of a decode call, for which a request that arrives has to wait
_TIMED, _TRIES = 9, 3  # steps by which the time of one is measured; and how often


class Runner:
    """Holds a model, all slots and the row in which long prompts are read. Calls do not wait for the device.

    Attributes:
      chunks: tokens of a prompt that go in at a time, ascending.
      together: by chunk, how many prompts of that length a call may read beside one alone, ascending.
      fixed: by number of rows, the steps of the loops that `fixed_steps` runs; empty where there are none.
      blocks: whether the host waits in `steps` until these are over.
      programs: the jitted functions by name.
      cache_bytes: of keys and values of all slots.
    """

    def __init__(self, model: Decoder, settings: EngineSettings):
        """Take memory for all slots and compile everything.

        Raises:
          TwlaError: there is no such model, `max_length` exceeds its positions, or the memory is too small.
        """
        require_model(model)
        most = model.config.max_position_embeddings
        if settings.max_length > most:
            raise TwlaError(f"max_length {settings.max_length}: the model has {most} positions")
        chunk = next((n for n in settings.chunks if n >= settings.max_length), settings.chunks[-1])
        self.chunks = tuple(n for n in settings.chunks if n <= chunk)
        size = -(-settings.max_length // chunk) * chunk
        self.together = prompts_together(settings, self.chunks, model)
        self.fixed: dict[int, int] = {}
        self.blocks = jax.default_backend() == "gpu" if settings.ahead is None else settings.ahead
        self._config, self._settings = model.config, settings
        self._leaves, structure = jax.tree.flatten(on_device(model))
        mesh, dtype = mesh_of(self._leaves), settings.cache_dtype
        with _room_is_named():
            self._slots, of_slots = _placed(
                lambda: device.empty_slots(model, settings.slots, size, dtype), mesh
            )
            self._staged, of_staged = None, None
            if settings.max_length > chunk:
                self._staged, of_staged = _placed(lambda: model.init_cache(1, size, dtype), mesh)
            self.programs = jitted(structure, settings.steps, of_slots, of_staged)
            self.cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._slots.cache.layers))
            self._compile()

    def width(self, length: int) -> int | None:
        """Return the places that a prompt of this length takes, or None if it is longer than a chunk."""
        return next((n for n in self.chunks if n >= length), None)

    def read(self, generations: Sequence[Generation], places: Sequence[int]) -> Made:
        """Put requests with prompts of one width into slots, and return their first tokens, in their order.

        Args:
          generations: one, or as many as the last number of `together` at most.
          places: their slots.
        """
        arguments = self._prompts(generations, places)
        made, self._slots = self.programs["read"](self._leaves, self._slots, *arguments)
        return made

    def _prompts(self, generations: Sequence[Generation], places: Sequence[int]) -> tuple[Any, ...]:
        """Return what `slots.read` takes of these requests, padded."""
        width = self.width(len(generations[0].prompt))
        assert width is not None
        count = next(n for n in (1, *self.together.get(width, ())) if n >= len(generations))
        prompts, counts = np.zeros((count, width), np.int32), np.ones(count, np.int32)
        for index, each in enumerate(generations):
            counts[index] = len(each.prompt)
            prompts[index, : counts[index]] = each.prompt
        padding = count - len(generations)
        requests = together([self._row(each) for each in (*generations, *[_nothing(1)] * padding)])
        beyond = self._settings.slots + np.arange(padding)
        return prompts, counts, requests, np.asarray([*places, *beyond], np.int32)

    def prefill(self, prompt: Sequence[int], start: int) -> tuple[jax.Array, int, int]:
        """Read the next tokens of a prompt that is longer than a chunk into the row for such prompts.

        Args:
          prompt: all of its tokens.
          start: how many were read before.

        Returns:
          Logits after them `[1, vocab]`, how many they are, and how many places they took.
        """
        width = self.chunks[-1]
        count = min(width, len(prompt) - start)
        logits, self._staged = self.programs["prefill"](*self._chunk(prompt, start, count))
        return logits, count, width

    def _chunk(self, prompt: Sequence[int], start: int, count: int) -> tuple[Any, ...]:
        """Return what `slots.prefill` takes of the next `count` tokens of a prompt, with the model and the row."""
        part = np.zeros((1, self.chunks[-1]), np.int32)
        part[0, :count] = prompt[start : start + count]
        numbers = (np.int32(start), np.int32(count), np.int32(len(prompt)))
        return self._leaves, part, *numbers, self._staged

    def forget(self) -> None:
        """Empty the row for long prompts: NaN in it would reach what is read into it, even past the prompt's end."""
        self._staged = self.programs["forget"](self._staged)

    def admit(self, generation: Generation, logits: jax.Array, slot: int) -> Made:
        """Put the request whose long prompt was read into a slot, and return its first token."""
        request = self._row(generation)
        made, self._slots = self.programs["admit"](self._slots, self._staged, logits, request, np.int32(slot))
        return made

    def move(self, source: int, target: int) -> None:
        """Move a request to another slot."""
        self._slots = self.programs["move"](self._slots, np.int32(source), np.int32(target))

    def steps(self, rows: int, keep: np.ndarray, count: int) -> Made:
        """Return the tokens of the next `count` steps of the first `rows` slots; see `loops.steps`."""
        made, self._slots = self.programs["steps"](
            self._leaves, self._slots, keep, np.int32(count), rows=rows
        )
        return made

    def fixed_steps(self, rows: int, keep: np.ndarray, *, filtered: bool) -> Made:
        """Return the tokens of the next `fixed[rows]` steps of the first `rows` slots; see `loops.fixed_steps`."""
        made, self._slots = self.programs["fixed_steps"](
            self._leaves, self._slots, keep, rows=rows, count=self.fixed[rows], filtered=filtered
        )
        return made

    def _row(self, generation: Generation) -> Rows:
        return row(
            generation.sampling,
            limit=generation.max_new_tokens,
            ends=generation.ends,
            told=generation.logprobs,
            config=self._config,
        )

    def _compile(self) -> None:
        """Compile every program, and run it on nothing."""
        settings = self._settings
        none = np.zeros(settings.slots, bool)
        prompts = [
            ([_nothing(width)] * count, range(count))
            for width in self.chunks
            for count in (1, *self.together.get(width, ()))
        ]
        read, steps = self.programs["read"], self.programs["steps"]
        given, long = (self._leaves, self._slots), (0,) * (self.chunks[-1] + 1)
        prefill = functools.partial(self.programs["prefill"].lower, *self._chunk(long, 0, self.chunks[-1]))
        compile_together(
            [
                *([] if self._staged is None else [prefill]),
                *(functools.partial(read.lower, *given, *self._prompts(*each)) for each in prompts),
                *(
                    functools.partial(steps.lower, *given, none, np.int32(1), rows=rows)
                    for rows in settings.row_counts
                ),
            ]
        )
        for _ in range(2):  # what the first round returned may be placed otherwise than what it was given
            for each in prompts:
                self.read(*each)
            if self._staged is not None:
                logits, *_ = self.prefill(long, 0)
                self.admit(_nothing(1), logits, 0)
                self.forget()
            self.move(0, 0)
            for rows in settings.row_counts:
                self.steps(rows, none, 1)
        if self.blocks and not settings.one_shape:
            self.fixed = {rows: self._steps_in_time(rows) for rows in settings.row_counts}
            self._compile_fixed(none)
        jax.block_until_ready(self._slots)

    def _compile_fixed(self, none: np.ndarray) -> None:
        """Compile the loops of fixed length, and run them on nothing."""
        lower = self.programs["fixed_steps"].lower
        both = [(rows, filtered) for rows in self.fixed for filtered in (False, True)]
        given = self._leaves, self._slots, none
        compile_together(
            [
                functools.partial(lower, *given, rows=rows, count=self.fixed[rows], filtered=filtered)
                for rows, filtered in both
            ]
        )
        for rows, filtered in 2 * both:
            self.fixed_steps(rows, none, filtered=filtered)

    def _steps_in_time(self, rows: int) -> int:
        """Return how many steps a call of a fixed number has: 1, 2, 3, 4, 6, 8, 12, … as fit into `CALL_SECONDS`."""
        self.read([Generation(prompt=(0,), max_new_tokens=2**20)], [0])
        only = np.arange(self._settings.slots) == 0

        def seconds(count: int) -> float:
            begun = time.perf_counter()
            jax.block_until_ready(self.steps(rows, only, count))
            return time.perf_counter() - begun

        def least(count: int) -> float:
            return min(
                seconds(count) for _ in range(_TRIES)
            )  # what else the host does takes time only now and then

        most, enough = self._settings.steps, self._settings.max_length >= 2 * _TRIES * _TIMED
        if enough:
            seconds(1)  # ends what was begun before
            step = (least(_TIMED) - least(1)) / (_TIMED - 1)
            most = min(most, int(CALL_SECONDS / max(step, 1e-6)))
        power = 2 ** (max(1, most).bit_length() - 1)
        return max(power, 3 * power // 2 if 3 * power // 2 <= most else 0)


def _nothing(width: int) -> Generation:
    """Return a request whose prompt takes so many places."""
    return Generation(prompt=(0,) * width, max_new_tokens=1, sampling=Sampling())


@contextlib.contextmanager
def _room_is_named() -> Iterator[None]:
    """Name the settings that help where the device's memory is not enough."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        cure = "lower slots or max_length, or keep keys and values in int8 (--kv-cache int8)"
        raise TwlaError(f"the device's memory is too small for the model and all slots; {cure}") from error


def _placed[T: (device.Slots, KVCache)](make: Callable[[], T], mesh: Mesh | None) -> tuple[T, Any]:
    """Return slots or a cache on a mesh, and their shardings; without a mesh, None for these."""
    if mesh is None:
        return make(), None
    where = shardings(jax.eval_shape(make), mesh)
    return jax.jit(make, out_shardings=where)(), where
