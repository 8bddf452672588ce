"""Draws windows of tokens from a text, or in equal numbers from the domains of a mix."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from twla_jax.errors import TwlaError
from twla_jax.recipe import CalibrationSettings
from twla_jax.text.corpora import Corpus, require_calibration, tokenize
from twla_jax.text.token_ids import cut, text_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = Int32[np.ndarray, " t"] | tuple[Int32[np.ndarray, " _"], ...]  # of a text, or of a mix's domains

_LETTERS_PER_TOKEN = 9  # of a domain's text that are read: twice the tokens that are drawn, or more
_LEAST_LETTERS = 400_000


def domain_tokens(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, wanted: int
) -> Tokens:
    """Return the tokens of a calibration text: of each domain, so many as `wanted` need, where it is a mix.

    Args:
      corpus: marked for calibration.
      tokenizer: of the model.
      vocab_size: of the model.
      wanted: how many tokens will be drawn in all.
    Raises:
      TwlaError: what `require_calibration` and `tokenize` refuse.
    """
    require_calibration(corpus)
    if not corpus.parts:
        return tokenize(corpus, tokenizer, vocab_size)
    letters = max(_LEAST_LETTERS, _LETTERS_PER_TOKEN * wanted // len(corpus.parts))
    return tuple(tokenize(part, tokenizer, vocab_size, letters) for part in corpus.parts)


def sample_windows(
    tokens: Tokens, windows: int, seq_len: int, seed: int
) -> Int32[np.ndarray, "windows seq_len"]:
    """Draw windows at offsets uniform with replacement; the same seed draws the same.

    Those of a mix come from its domains in turn, so that each has as many, give or take one.

    Raises:
      TwlaError: fewer tokens than one window, in the text or in a domain.
    """
    if isinstance(tokens, tuple):
        counts = _counts(len(tokens), windows)
        drawn = [
            sample_windows(part, count, seq_len, _domain_seed(seed, index))
            for index, (part, count) in enumerate(zip(tokens, counts, strict=True))
        ]
        return _in_turn(drawn)
    return cut(tokens, _starts(len(tokens), windows, text_length(tokens, seq_len), seed), seq_len)


def calibration_windows(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, settings: CalibrationSettings
) -> Int32[np.ndarray, "windows seq_len"]:
    """Draw the windows that a recipe calibrates on.

    Raises:
      TwlaError: what `require_calibration`, `tokenize` and `sample_windows` refuse.
    """
    tokens = domain_tokens(corpus, tokenizer, vocab_size, settings.windows * settings.seq_len)
    return sample_windows(tokens, settings.windows, settings.seq_len, settings.seed)


def held_out_windows(
    tokens: Tokens,
    drawn: Sequence[CalibrationSettings],
    windows: int,
    seq_len: int,
    *,
    seed: int,
) -> tuple[Int32[np.ndarray, "windows seq_len"], float]:
    """Draw windows of the same text that hold as little as possible of what `sample_windows` drew for `drawn`.

    One after another, where tokens were drawn the fewest times before, at random among equals; the same settings give
    the same windows.

    Returns:
      The windows, and the share of their tokens that `drawn` or another of these windows holds too.
    Raises:
      TwlaError: fewer tokens than one window.
    """
    if isinstance(tokens, tuple):
        chosen, shares = [], 0.0
        for index, (part, count) in enumerate(zip(tokens, _counts(len(tokens), windows), strict=True)):
            seen = [
                dataclasses.replace(
                    settings,
                    windows=number,
                    seed=_domain_seed(settings.seed, index),
                )
                for settings in drawn
                if (number := _counts(len(tokens), settings.windows)[index])
            ]
            held_out, share = held_out_windows(part, seen, count, seq_len, seed=_domain_seed(seed, index))
            chosen.append(held_out)
            shares += share * count
        return _in_turn(chosen), shares / windows
    length = text_length(tokens, seq_len)
    changes = np.zeros(len(tokens) + 1, np.int64)
    for settings in drawn:
        drawn_length = text_length(tokens, settings.seq_len)
        starts = _starts(len(tokens), settings.windows, drawn_length, settings.seed)
        np.add.at(changes, starts, 1)
        np.add.at(changes, starts + drawn_length, -1)
    times = np.cumsum(changes)[:-1]
    places = np.random.default_rng(seed).permutation(_places(len(tokens), length))
    chosen, shared = [], 0
    for _ in range(windows):
        before = np.concatenate([[0], np.cumsum(times)])
        start = places[(before[places + length] - before[places]).argmin()]
        here = slice(start, start + length)
        shared += int((times[here] > 0).sum())
        times[here] += 1
        chosen.append(start)
    starts = np.asarray(chosen, np.int64)
    return cut(tokens, starts, seq_len), shared / max(1, windows * length)


def _counts(domains: int, windows: int) -> list[int]:
    """Return how many of the windows come from each domain, when they take turns."""
    return [(windows + domains - 1 - index) // domains for index in range(domains)]


def _domain_seed(seed: int, index: int) -> int:
    """Return a seed of the domain's own, so that equal seeds do not draw equal offsets everywhere."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _in_turn(drawn: Sequence[np.ndarray]) -> np.ndarray:
    """Return the windows of all domains in the order in which they take turns."""
    turns = np.concatenate([np.arange(len(part)) for part in drawn])
    return np.concatenate(drawn)[np.argsort(turns, kind="stable")]


def _starts(tokens: int, windows: int, seq_len: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, _places(tokens, seq_len), windows)


def _places(tokens: int, seq_len: int) -> int:
    """Return the number of offsets at which a window can begin."""
    if tokens < seq_len:
        raise TwlaError(
            f"the corpus has {tokens} tokens, fewer than one window of {seq_len}: shorten --seq-len or add text"
        )
    return tokens - seq_len + 1
