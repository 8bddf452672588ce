"""Turns tokens into answers in the form of OpenAI's API: texts up to a stop text, log-probabilities, usage."""

import dataclasses
import functools
import time
import uuid
from collections.abc import Sequence
from typing import Any

from twla_jax.inference.text_generation import Detokenizer, StopTexts
from twla_jax.serving.requests import Delivery, Reason, Ticket


@dataclasses.dataclass(kw_only=True)
class Piece:
    """Some more of an answer.

    Attributes:
      text: what it adds.
      logprobs: of its tokens, in the API's form; None where they are not wanted.
      reason: why the answer ends with it; None where it goes on.
    """

    text: str
    logprobs: dict[str, Any] | None
    reason: Reason | None


class Choice:
    """One answer while it is made.

    Attributes:
      index: its place among the answers to a request.
      tokens: how many it has.
      reason: why it ended; None before.
      ticket: its place in the engine, set once it has one.
    """

    ticket: Ticket

    def __init__(
        self,
        index: int,
        tokenizer: Any,
        prompt: Sequence[int],
        *,
        chat: bool,
        stop: Sequence[str],
        top: int | None,
    ):
        self.index, self.tokens = index, 0
        self.reason: Reason | None = None
        self._spelled = functools.partial(_spelled, tokenizer)
        self._detokenizer, self._stopping = Detokenizer(tokenizer, prompt), StopTexts(stop)
        self._chat, self._top, self._length = chat, top, 0
        self._plain = not stop and top is None  # single tokens do not matter

    def read(self, delivery: Delivery) -> Piece:
        """Return what new tokens add. With a stop text, the answer ends there, and what follows is not read."""
        self.reason = delivery.reason
        if self._plain:
            self.tokens += len(delivery.tokens)
            return Piece(text=self._detokenizer.push_all(delivery.tokens), logprobs=None, reason=self.reason)
        pieces, offsets = [], []
        for token in delivery.tokens:
            offsets.append(self._length)
            pieces.append(self._stopping.push(self._detokenizer.push(token)))
            self._length += len(pieces[-1])
            self.tokens += 1
            if self._stopping.reached:
                self.reason = "stop"
                break
        if self.reason is not None:
            pieces.append(self._stopping.rest())
        return Piece(text="".join(pieces), logprobs=self._logprobs(delivery, offsets), reason=self.reason)

    def _logprobs(self, delivery: Delivery, offsets: list[int]) -> dict[str, Any] | None:
        if self._top is None or delivery.told is None:
            return None
        tokens = delivery.tokens[: len(offsets)]
        chosen = delivery.told.chosen.tolist()[: len(tokens)]
        tops = [
            list(zip(ids[: self._top], values[: self._top], strict=True))
            for ids, values in zip(delivery.told.top_tokens.tolist(), delivery.told.top.tolist(), strict=True)
        ][: len(tokens)]
        if self._chat:
            rows = [
                {**self._row(token, value), "top_logprobs": [self._row(*each) for each in top]}
                for token, value, top in zip(tokens, chosen, tops, strict=True)
            ]
            return {"content": rows, "refusal": None}
        return {
            "tokens": [self._spelled(token) for token in tokens],
            "token_logprobs": chosen,
            "top_logprobs": [{self._spelled(token): value for token, value in top} for top in tops],
            "text_offset": offsets,
        }

    def _row(self, token: int, value: float) -> dict[str, Any]:
        spelled = self._spelled(token)
        letters = None if "\ufffd" in spelled else [*spelled.encode()]
        return {"token": spelled, "logprob": value, "bytes": letters}


@functools.lru_cache(maxsize=2**16)
def _spelled(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Envelope:
    """Wraps the answers to one request: whole, or piece by piece."""

    def __init__(self, model: str, prompt_tokens: int, *, chat: bool):
        self._chat, self._prompt_tokens = chat, prompt_tokens
        self._identity = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """Return the body with every choice's pieces joined."""
        rows = []
        for choice, parts in zip(choices, pieces, strict=True):
            words = "".join(part.text for part in parts)
            message = {"role": "assistant", "content": words, "refusal": None}
            said: dict[str, Any] = {"message": message} if self._chat else {"text": words}
            rows.append(
                {
                    "index": choice.index,
                    **said,
                    "logprobs": _joined([part.logprobs for part in parts]),
                    "finish_reason": choice.reason,
                }
            )
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._identity, "object": kind, "choices": rows, "usage": self.usage(choices)}

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """Return what begins a choice's stream: in a chat, who speaks."""
        said = {"delta": {"role": "assistant", "content": ""}}
        return self._event(choice, said, None, None) if self._chat else None

    def event(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """Return a piece of a stream."""
        said = (
            {"delta": {"content": piece.text} if piece.text else {}} if self._chat else {"text": piece.text}
        )
        return self._event(choice, said, piece.logprobs, piece.reason)

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return what ends a stream whose usage is wanted."""
        return {**self._identity, "object": self._kind, "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Return the tokens of the prompts and of the answers."""
        new = sum(choice.tokens for choice in choices)
        total = self._prompt_tokens + new
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": new, "total_tokens": total}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _event(
        self, choice: Choice, said: dict[str, Any], logprobs: Any, reason: Reason | None
    ) -> dict[str, Any]:
        row = {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": reason}
        return {**self._identity, "object": self._kind, "choices": [row]}


def _joined(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return {
        key: None if value is None else [each for part in found for each in part[key]]
        for key, value in found[0].items()
    }
