"""Holds a conversation with a model: messages, and the keys and values of what was said so far.

Each answer reads only what is new since the last one.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.inference import generation
from twla_jax.inference.request import checked_request
from twla_jax.inference.sampling import Sampling
from twla_jax.inference.text_generation import Detokenizer, StopTexts, read_text
from twla_jax.models.decoder import Decoder
from twla_jax.ops.attention.kv_cache import KVCache
from twla_jax.text import chat


class Conversation:
    """Messages so far, and a model that answers the next one.

    Attributes:
      messages: each with `role` and `content`, the system prompt first where there is one.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 1024,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        cache_dtype: Any = None,
    ):
        """Begin a conversation.

        Args:
          model: quantised or not, packed or not.
          tokenizer: the model's, with a chat template.
          system: the system prompt, if any.
          max_new_tokens: the most tokens of an answer; fewer where the model has no positions left for as many.
          sampling: how tokens are chosen; each answer's random numbers are its own.
          stop: texts at which an answer ends, before them.
          cache_dtype: as `generation.stream` takes it.

        Raises:
          TwlaError: the tokenizer has no chat template, or it takes no system prompt.
        """
        self._model, self._tokenizer = model, tokenizer
        self._count, self._stop = max_new_tokens, tuple(stop)
        self._sampling = Sampling() if sampling is None else sampling
        StopTexts(self._stop)  # refuses what is none
        self._text = KeptText(model, cache_dtype=cache_dtype)
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._answers = 0
        self.messages: list[dict[str, str]] = list(self._first)
        chat.render_chat(tokenizer, [*self._first, _said("user", "question")], answer=True)
        self._ends = chat.ends_of_answer(tokenizer, model.config.eos_token_ids)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self._first)

    def answer(self, text: str) -> Iterator[str]:
        """Say something; yields the pieces of the answer as they are made.

        Both become part of the conversation, the answer as far as it came where it is cut short. Where nothing of it
        came, the conversation is as before.

        Raises:
          TwlaError: the conversation has no room left in the model's positions; or as `generation.stream`.
        """
        asked = [*self.messages, _said("user", text)]
        ids = chat.encode_chat(self._tokenizer, asked)
        limit = self._model.config.max_position_embeddings
        if len(ids) >= limit:
            raise TwlaError(f"the conversation has {len(ids)} tokens, and the model {limit} positions")
        key = jax.random.fold_in(jax.random.key(self._sampling.seed), self._answers)
        self._answers += 1
        tokens = self._text.stream(
            *(ids, min(self._count, limit - len(ids))),
            sampling=self._sampling,
            key=key,
            eos_token_ids=self._ends,
        )
        pieces: list[str] = []
        try:
            for _, piece in read_text(tokens, Detokenizer(self._tokenizer, ids), StopTexts(self._stop)):
                pieces.append(piece)
                yield piece
        finally:
            if answer := "".join(pieces):
                self.messages = [*asked, _said("assistant", answer)]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class KeptText:
    """Continues one growing text, whose keys and values are kept from call to call."""

    def __init__(self, model: Decoder, *, cache_dtype: Any = None):
        self._model, self._dtype = model, cache_dtype
        self._cache: KVCache | None = None
        self._ids: list[int] = []  # those that the cache holds

    def stream(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling,
        key: jax.Array,
        eos_token_ids: Collection[int],
    ) -> Iterator[int]:
        """Continue `ids` token by token; what they have in common with the last text is not computed again.

        Arguments and errors are those of `generation.stream`.
        """
        request = checked_request(
            self._model,
            np.asarray([ids], np.int32),
            max_new_tokens,
            sampling=sampling,
            key=key,
            eos_token_ids=eos_token_ids,
        )
        self._model = request.model  # on the device from now on
        cache, held = self._for(list(ids), max_new_tokens)
        written = list(ids)
        steps = generation.advance(request, cache, held=held, cache_dtype=self._dtype)
        for token, cache in steps:
            self._cache, self._ids = cache, list(written)
            written.append(int(token[0]))
            yield written[-1]
            # The next step takes the cache's memory: after an interrupt within it, there is none.
            self._cache = None
        self._cache = cache  # no step followed the last token

    def _for(self, ids: list[int], count: int) -> tuple[KVCache, int]:
        """Return a cache with room, and how many of these tokens it holds; its memory doubles when it grows."""
        cache, self._cache = self._cache, None
        pairs = zip(ids[:-1], self._ids, strict=False)  # the last token's output is needed
        held = next(
            (i for i, (one, other) in enumerate(pairs) if one != other), min(len(ids) - 1, len(self._ids))
        )
        scaling = self._model.config.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            long = [len(each) > scaling.original_max_position_embeddings for each in (ids, self._ids)]
            if long[0] != long[1]:
                held = 0  # what was written before had the other factors
        if cache is None or generation.room_for(len(ids), held, count) > cache.size:
            size = generation.bucket(generation.room_for(len(ids), 0, count))
            del cache
            return self._model.init_cache(1, size, self._dtype), 0
        return cache, held
