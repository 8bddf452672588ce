"""Scores models on one text, and keeps every perplexity in a file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from twla_jax import json_files, json_text, schema
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import evaluate, perplexity
from twla_jax.jobs import loading
from twla_jax.models import sites
from twla_jax.reports.run import Phases
from twla_jax.schema import check_values
from twla_jax.storage import resume, whole_files
from twla_jax.text import corpora
from twla_jax.text.corpora import Corpus

# What `evaluate` returns; a perplexity that is not finite was written as null.
_FIGURE = schema.optional(schema.number(0, 1e308))
_SCORE = schema.record(perplexity=_FIGURE, nll=_FIGURE, windows=schema.integer(1, 10**9))


class Measured:
    """Keeps perplexities by fingerprint, in a file that is written anew whenever one is added."""

    def __init__(self, path: Path):
        self._path = path
        self.scores: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                read = json_files.read_json(path)
                check_values({"scores": None, **read}, {"scores": schema.mapping(_SCORE)}, str(path))
            except TwlaError as error:
                raise TwlaError(f"{error}; remove it") from None
            unknown = {"perplexity": math.nan, "nll": math.nan}
            self.scores = {
                key: score | {name: value for name, value in unknown.items() if score[name] is None}
                for key, score in read["scores"].items()
            }

    def add(self, fingerprint: str, score: dict[str, Any]) -> None:
        """Keep what was measured, in the file as well."""
        self.scores[fingerprint] = score
        with whole_files.beside(self._path) as temporary:
            temporary.write_text(json_text.dumps({"scores": self.scores}))


class Scorer:
    """Scores models on one text, unless that was measured before."""

    def __init__(
        self, measured: Measured, text: Corpus, dtype: str, settings: dict, phases: Phases, progress: bool
    ):
        self._measured, self._text, self._dtype = measured, text, dtype
        self._settings, self._phases, self._progress = settings, phases, progress

    def __call__(
        self, name: str, identity: Any, model: str | Path, bits: Sequence[int]
    ) -> dict[str, dict[str, Any]]:
        """Return `evaluate`'s figures by bits; `identity` says which weights these are, `model` where to read them."""
        common = {"weights": identity, "dtype": self._dtype, **self._settings}
        measured, texts = self._measured, {text.name: text for text in self._text.parts or (self._text,)}
        keys = {
            (each, text): resume.fingerprint({**common, "text": texts[text].sha256, "bits": each}, [])
            for each in bits
            for text in texts
        }
        if missing := [each for each, key in keys.items() if key not in measured.scores]:
            with self._phases(f"{name}: evaluate"):
                decoder, tokenizer = loading.load(model, dtype=jnp.dtype(self._dtype))
                for each, text in missing:
                    tokens = corpora.tokenize(texts[text], tokenizer, decoder.config.vocab_size)
                    scored = evaluate(
                        sites.set_activation_bits(decoder, each),
                        tokens,
                        progress=self._progress,
                        **self._settings,
                    )
                    measured.add(keys[each, text], scored)
        return {
            f"A{each}": _over_texts({text: measured.scores[keys[each, text]] for text in texts})
            for each in bits
        }


def _over_texts(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one text as they are; of several their mean over windows, with all in `domains`."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    windows = sum(score["windows"] for score in scores.values())
    nll = sum(score["nll"] * score["windows"] for score in scores.values()) / windows
    domains = {name: score["perplexity"] for name, score in scores.items()}
    return {"perplexity": perplexity(nll), "nll": nll, "windows": windows, "domains": domains}
