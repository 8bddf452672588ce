"""Generates text from prompts and chats, token by token or several texts at once."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.inference import generation
from twla_jax.inference.sampling import Sampling
from twla_jax.limits import check_number
from twla_jax.models.decoder import Decoder
from twla_jax.text import chat

_LONGEST_STOP = 4096
Prompt = str | Sequence[int]  # text, or the token ids of one, as `chat.encode_chat` returns them


def stream_text(
    model: Decoder,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    eos_token_ids: Collection[int] | None = None,
    cache_dtype: Any = None,
) -> Iterator[tuple[int, str]]:
    """Continue a prompt; yields each new token with the text it adds, which is empty inside a character.

    Args:
      model: quantised or not, packed or not.
      tokenizer: the model's.
      prompt: text to continue, or its token ids.
      max_new_tokens: the most tokens that are added.
      sampling: how tokens are chosen; the likeliest ones if None.
      stop: texts at which the continuation ends, before them. What may begin one is held back until it is known.
      eos_token_ids: as `generation.stream` takes them.
      cache_dtype: as `generation.stream` takes it.

    Raises:
      TwlaError: what `generation.stream` refuses, or an empty stop text.
    """
    ids = prompt_ids(tokenizer, prompt)
    stopping = StopTexts(stop)
    steps = generation.stream(
        model,
        np.asarray([ids], np.int32),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_ids=eos_token_ids,
        cache_dtype=cache_dtype,
    )
    yield from read_text((int(step[0]) for step in steps), Detokenizer(tokenizer, ids), stopping)


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt."""
    return chat.encode_text(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)


def read_text(
    tokens: Iterable[int], detokenizer: "Detokenizer", stopping: "StopTexts"
) -> Iterator[tuple[int, str]]:
    """Yield each token with the text that it adds, up to a stop text; the last pair has what was held back.

    Args:
      tokens: new ones, as they come.
      detokenizer: knows what stands before them.
      stopping: where to end.
    """
    waiting = None
    for token in tokens:
        if waiting is not None:
            yield waiting
            waiting = None
        piece = stopping.push(detokenizer.push(token))
        if stopping.reached:
            yield token, piece
            return
        if stopping.holds:
            waiting = token, piece
        else:
            yield token, piece
    if waiting is not None:
        yield waiting[0], waiting[1] + stopping.rest()


class Detokenizer:
    """Turns tokens into text as they come; half a character gives none until it is whole.

    A token's text may depend on those right before it (a space, a joined accent), so a few of them are decoded along.
    """

    _BEFORE = 8
    _LONGEST_CHARACTER = 4  # tokens, each at least a byte of it

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self._text = _decoder(tokenizer)
        self._ids = list(before[-self._BEFORE :])
        self._shown = len(self._ids)  # ids whose text was given out

    def push(self, token: int) -> str:
        """Return the text that a token adds."""
        self._ids.append(int(token))
        known = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        whole = text.startswith(known) and not text.endswith("\ufffd")
        if not whole and len(self._ids) - self._shown < self._LONGEST_CHARACTER:
            return ""
        return self._shown_now(text[len(known) :])

    def push_all(self, tokens: Sequence[int]) -> str:
        """Return the text that several tokens add, as `push` would one by one, in a fraction of the time."""
        ids = [*self._ids, *map(int, tokens)]
        known, text = self._decode(self._ids[: self._shown]), self._decode(ids)
        # Half a character may merge with bytes before it that are no text, and add nothing to see.
        if not text.startswith(known) or "\ufffd" in text[len(known) :] or text.endswith("\ufffd"):
            return "".join(map(self.push, tokens))
        self._ids = ids
        return self._shown_now(text[len(known) :])

    def _shown_now(self, text: str) -> str:
        self._ids = self._ids[max(0, self._shown - self._BEFORE) :]
        self._shown = len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._text(ids, skip_special_tokens=True)


def _decoder(tokenizer: Any) -> Callable[..., str]:
    """Return what turns ids into text: of the `tokenizers` library, unless a tokenizer's class has its own way.

    transformers first looks at every id, which takes four times as long as the rest.
    """
    whole = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return whole
    from transformers import PreTrainedTokenizerFast as Plain

    kind = type(tokenizer)
    own = any(getattr(kind, name) is not getattr(Plain, name) for name in ("decode", "_decode"))
    return whole if own else backend.decode


class StopTexts:
    """Ends a text at the first of several stop texts, however they are cut into pieces.

    Attributes:
      reached: whether one was found; nothing follows then.
    """

    def __init__(self, stop: Sequence[str]):
        """Take the stop texts.

        Raises:
          TwlaError: one is empty or very long.
        """
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_STOP:
                raise TwlaError(f"stop: a stop text has 1 to {_LONGEST_STOP} characters")
        self._stop = tuple(stop)
        self._held = ""
        self.reached = False

    @property
    def holds(self) -> bool:
        """Returns whether something is held back."""
        return bool(self._held)

    def push(self, piece: str) -> str:
        """Return what can be given out once a piece was added: all but the beginning of a possible stop text."""
        text = self._held + piece
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.reached, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """Return what was held back, where no stop text came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def sample_texts(
    model: Decoder,
    tokenizer: Any,
    prompt: Prompt,
    *,
    samples: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    eos_token_ids: Collection[int] | None = None,
    cache_dtype: Any = None,
) -> tuple[list[str], list[list[int]]]:
    """Return several continuations of a prompt, made side by side: their texts and tokens, each up to where it ended.

    Arguments are those of `stream_text`.

    Raises:
      TwlaError: what `stream_text` refuses, or fewer than one sample.
    """
    check_number("samples", samples)
    StopTexts(stop)  # refuses before the work
    ids = prompt_ids(tokenizer, prompt)
    tokens = generation.generate(
        model,
        np.tile(np.asarray(ids, np.int32), (samples, 1)),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_ids=eos_token_ids,
        cache_dtype=cache_dtype,
    )
    ends = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
    texts, rows = [], []
    for row in tokens.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        pairs = list(read_text(row[:end], Detokenizer(tokenizer, ids), StopTexts(stop)))
        texts.append("".join(piece for _, piece in pairs))
        rows.append([token for token, _ in pairs])
    return texts, rows
