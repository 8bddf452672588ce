"""Windows of tokens, drawn from a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from twla_jax.errors import TwlaError
from twla_jax.recipe import CalibrationRecipe
from twla_jax.text.corpora import Corpus, require_calibration, tokenize


def sample_windows(
    tokens: Int32[np.ndarray, " t"], windows: int, seq_len: int, seed: int
) -> Int32[np.ndarray, "windows seq_len"]:
    """Windows at offsets drawn uniformly with replacement; the same seed draws the same.

    Raises:
      TwlaError: fewer tokens than one window.
    """
    return _cut(tokens, _starts(len(tokens), windows, seq_len, seed), seq_len)


def calibration_windows(
    corpus: Corpus, tokenizer: Any, vocab_size: int, settings: CalibrationRecipe
) -> Int32[np.ndarray, "windows seq_len"]:
    """The windows that a recipe calibrates on.

    Raises:
      TwlaError: what `require_calibration`, `tokenize` and `sample_windows` refuse.
    """
    tokens = tokenize(require_calibration(corpus), tokenizer, vocab_size)
    return sample_windows(tokens, settings.windows, settings.seq_len, settings.seed)


def held_out_windows(
    tokens: Int32[np.ndarray, " t"],
    drawn: Sequence[CalibrationRecipe],
    windows: int,
    seq_len: int,
    *,
    seed: int,
) -> tuple[Int32[np.ndarray, "windows seq_len"], float]:
    """Windows of the same text that hold as little as possible of what `sample_windows` drew for `drawn`.

    One after another, where tokens were drawn the fewest times before, at random among equals; the same settings give
    the same windows.

    Returns:
      The windows, and the share of their tokens that `drawn` or another of these windows holds too.
    Raises:
      TwlaError: fewer tokens than one window.
    """
    changes = np.zeros(len(tokens) + 1, np.int64)
    for settings in drawn:
        starts = _starts(len(tokens), settings.windows, settings.seq_len, settings.seed)
        np.add.at(changes, starts, 1)
        np.add.at(changes, starts + settings.seq_len, -1)
    times = np.cumsum(changes)[:-1]
    places = np.random.default_rng(seed).permutation(_places(len(tokens), seq_len))
    chosen, shared = [], 0
    for _ in range(windows):
        before = np.concatenate([[0], np.cumsum(times)])
        start = places[(before[places + seq_len] - before[places]).argmin()]
        here = slice(start, start + seq_len)
        shared += int((times[here] > 0).sum())
        times[here] += 1
        chosen.append(start)
    return _cut(tokens, np.asarray(chosen), seq_len), shared / (windows * seq_len)


def _starts(tokens: int, windows: int, seq_len: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, _places(tokens, seq_len), windows)


def _places(tokens: int, seq_len: int) -> int:
    """At how many offsets a window can begin."""
    if tokens < seq_len:
        raise TwlaError(
            f"the corpus has {tokens} tokens, fewer than one window of {seq_len}: shorten --seq-len or add text"
        )
    return tokens - seq_len + 1


def _cut(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> Int32[np.ndarray, "windows seq_len"]:
    return tokens[starts[:, None] + np.arange(seq_len)].astype(np.int32)
