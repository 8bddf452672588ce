"""Serves a model to lm-evaluation-harness: texts in, log-likelihoods and texts out."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.evaluation.likelihood import continuation_loglikelihoods, rolling_pairs
from twla_jax.inference.generation import stream
from twla_jax.models.arguments import require_model
from twla_jax.models.decoder import Decoder

_NEW_TOKENS = 256  # where a task does not say
_LOOK = 8  # tokens between two looks for a stop
_KNOWN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature"}
_HARMLESS = {"top_p": 1.0, "top_k": 0, "num_beams": 1}


class HarnessModel:
    """Answers the requests of lm-evaluation-harness with a model of this library.

    It has what the harness calls of its `LM`, and imports nothing of it: `as_lm` makes it one. A request is anything
    whose `args` are those of the harness's `Instance`.

    Attributes:
      rank: of this process, the only one.
      world_size: the number of processes.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        *,
        batch_tokens: int = 2048,
        max_length: int | None = None,
        progress: bool = True,
    ):
        """Wrap a model.

        Args:
          model: quantised or not, packed or not.
          tokenizer: the model's; as it does or does not, texts begin with BOS.
          batch_tokens: tokens that are scored at a time.
          max_length: tokens that the model reads at most; by default as many as it can.
          progress: bars on stderr.
        """
        require_model(model)
        self._model, self._tokenizer = model, tokenizer
        self._limit = max_length or model.config.max_position_embeddings
        self._options = {"max_length": self._limit, "batch_tokens": batch_tokens, "progress": progress}
        self._rows = max(1, batch_tokens // 256)  # that are continued side by side

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return `log p(continuation | context)` of requests `(context, continuation)`, and whether it is greedy."""
        pairs = [self._pair(*request.args) for request in requests]
        return continuation_loglikelihoods(self._model, pairs, **self._options)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return `log p(text)` of requests `(text,)`; what does not fit into the model is scored window by window."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            for pair in rolling_pairs(self._encode(request.args[0]), self._prefix, self._limit):
                pairs.append(pair)
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(
            owners, continuation_loglikelihoods(self._model, pairs, **self._options), strict=True
        ):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the continuations of requests `(context, settings)`, each up to where one of its `until` begins.

        Requests of equal settings whose contexts have the same number of tokens are continued side by side.

        Raises:
          TwlaError: a setting that would be ignored.
        """
        groups: dict[Any, list[tuple[int, list[int]]]] = {}
        for index, request in enumerate(requests):
            context, settings = request.args
            stops, count, temperature = _read(settings)
            ids = self._encode(context)[-max(1, self._limit - count) :]
            if not ids:
                ids = [self._prefix]
            groups.setdefault((len(ids), stops, count, temperature), []).append((index, ids))
        texts = [""] * len(requests)
        for (length, stops, count, temperature), members in sorted(groups.items(), reverse=True):
            for start in range(0, len(members), self._rows):
                here = members[start : start + self._rows]
                prompt = np.asarray([ids for _, ids in here], np.int32)
                found = self._continue(prompt, stops, min(count, self._limit - length), temperature)
                for (index, _), text in zip(here, found, strict=True):
                    texts[index] = text
        return texts

    def _continue(
        self, prompt: np.ndarray, stops: tuple[str, ...], count: int, temperature: float
    ) -> Iterator[str]:
        rows: list[list[int]] = [[] for _ in prompt]
        ends = self._model.config.eos_token_ids
        ended, done = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        steps = stream(
            self._model, prompt, max_new_tokens=count, temperature=temperature, key=jax.random.key(0)
        )
        for step, tokens in enumerate(steps, 1):
            for row, token in enumerate(tokens.tolist()):
                ended[row] |= token in ends
                if not ended[row]:
                    rows[row].append(token)
            if step % _LOOK == 0:
                done |= ended | [any(stop in self._decode(row) for stop in stops) for row in rows]
                if done.all():
                    break
        for row in rows:
            text = self._decode(row)
            yield text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both; spaces at the end of a context belong to what follows."""
        if not context:
            ids = self._encode(continuation, special=False)
            # A text that begins with BOS itself is predicted from there.
            return (ids[:1], ids[1:]) if ids[:1] == [self._prefix] else ([self._prefix], ids)
        stripped = context.rstrip()
        if not stripped:
            return self._pair("", context + continuation)
        before = self._encode(stripped)
        return before, self._encode(context + continuation)[len(before) :]

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        bos = self._tokenizer.bos_token
        special = special and not (bos and text.startswith(bos))
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def _prefix(self) -> int:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is None and eos is None:
            raise TwlaError("the tokenizer has neither BOS nor EOS, from which a text could begin")
        return eos if bos is None else bos


def _read(settings: dict[str, Any]) -> tuple[tuple[str, ...], int, float]:
    """Return the stops, the number of new tokens and the temperature that a request asks for."""
    for name, value in settings.items():
        if name not in _KNOWN and value not in (None, _HARMLESS.get(name)) and settings.get("do_sample"):
            raise TwlaError(f"generation setting {name} = {value!r} is not known; temperature is")
    stops = settings.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    count = settings.get("max_gen_toks") or settings.get("max_new_tokens") or _NEW_TOKENS
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
    return tuple(stop for stop in stops if stop), int(count), temperature
