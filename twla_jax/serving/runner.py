"""Runs on the device what an engine needs: holds the programs, and the arrays that they pass on.

All are compiled at the start: a step for each number of rows, a chunk of a prompt for each length, and what puts a
request into a slot or moves it to another.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.devices import on_device
from twla_jax.errors import TwlaError
from twla_jax.inference.sampling import Sampling
from twla_jax.models.arguments import require_model
from twla_jax.models.decoder import Decoder
from twla_jax.serving import slots as device
from twla_jax.serving.requests import Generation
from twla_jax.serving.rows import Made, row
from twla_jax.serving.settings import EngineSettings


class Runner:
    """Holds a model, all slots and the row in which prompts are prefilled. Calls do not wait for the device.

    Attributes:
      chunks: tokens of a prompt that go in at a time, ascending.
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
        self._config = model.config
        self._leaves, structure = jax.tree.flatten(on_device(model))
        self.programs = _programs(structure, settings.steps)
        with _room_is_named():
            self._slots = device.empty_slots(model, settings.slots, size, settings.cache_dtype)
            self._staged = model.init_cache(1, size, settings.cache_dtype)
            self.cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._slots.cache.layers))
            self._compile(settings)

    def prefill(self, prompt: Sequence[int], start: int) -> tuple[jax.Array, int, int]:
        """Read the next tokens of a prompt into the row for prompts.

        Args:
          prompt: all of its tokens.
          start: how many were read before.

        Returns:
          Logits after them `[1, vocab]`, how many they are, and how many places they took.
        """
        width = next((n for n in self.chunks if n >= len(prompt)), self.chunks[-1])
        count = min(width, len(prompt) - start)
        part = np.zeros((1, width), np.int32)
        part[0, :count] = prompt[start : start + count]
        numbers = (np.int32(start), np.int32(count), np.int32(len(prompt)))
        logits, self._staged = self.programs["prefill"](self._leaves, part, *numbers, self._staged)
        return logits, count, width

    def forget(self) -> None:
        """Empty the row for prompts: NaN in it would reach whatever is read into it, even past the end of a prompt."""
        self._staged = self.programs["forget"](self._staged)

    def admit(self, generation: Generation, logits: jax.Array, slot: int) -> Made:
        """Put the request whose prompt was read into a slot, and return its first token."""
        request = row(
            generation.sampling,
            limit=generation.max_new_tokens,
            ends=generation.ends,
            told=generation.logprobs,
            config=self._config,
        )
        made, self._slots = self.programs["admit"](self._slots, self._staged, logits, request, np.int32(slot))
        return made

    def move(self, source: int, target: int) -> None:
        """Move a request to another slot."""
        self._slots = self.programs["move"](self._slots, np.int32(source), np.int32(target))

    def steps(self, rows: int, keep: np.ndarray, count: int) -> Made:
        """Return the tokens of the next `count` steps of the first `rows` slots; see `slots.steps`."""
        made, self._slots = self.programs["steps"](
            self._leaves, self._slots, keep, np.int32(count), rows=rows
        )
        return made

    def _compile(self, settings: EngineSettings) -> None:
        """Run every program, on nothing."""
        nothing = Generation(prompt=(0,), max_new_tokens=1, sampling=Sampling())
        for _ in range(2):  # what the first round returned may be placed otherwise than what it was given
            for chunk in self.chunks:
                logits, *_ = self.prefill((0,) * chunk, 0)
                self.admit(nothing, logits, 0)
            self.forget()
            self.move(0, 0)
            for rows in settings.row_counts:
                self.steps(rows, np.zeros(settings.slots, bool), 1)
        jax.block_until_ready(self._slots)


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


def _programs(structure: Any, room: int) -> dict[str, Any]:
    """Return the jitted programs; they take a model's leaves, as a module is slow to take apart at every step."""

    def prefill(leaves, *arguments):
        return device.prefill(jax.tree.unflatten(structure, leaves), *arguments)

    def steps(leaves, slots, keep, count, *, rows):
        return device.steps(jax.tree.unflatten(structure, leaves), slots, keep, count, rows=rows, room=room)

    donating = functools.partial(jax.jit, donate_argnums=0)
    return {
        "prefill": jax.jit(prefill, donate_argnums=5),
        "steps": jax.jit(steps, donate_argnums=1, static_argnames="rows"),
        # Not the functions themselves: each engine counts its own programs.
        "admit": donating(lambda *arguments: device.admit(*arguments)),
        "forget": donating(lambda staged: jax.tree.map(jnp.zeros_like, staged)),
        "move": donating(lambda *arguments: device.move(*arguments)),
    }
