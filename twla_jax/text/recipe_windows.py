"""Which windows a quantisation calibrates on, refines on, and allocates bits on: of a corpus or of sampled text."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int32

from twla_jax.errors import TwlaError
from twla_jax.recipe import Recipe
from twla_jax.text import windows
from twla_jax.text.corpora import Corpus
from twla_jax.text.sampled import SampledText


def count(recipe: Recipe) -> int:
    """Windows that a recipe wants in all, so that none is used twice."""
    return recipe.calibration.windows + recipe.refine.windows + recipe.allocation.windows


Tokens = windows.Tokens | SampledText


def tokens_of(text: Corpus | SampledText, tokenizer: Any, vocab_size: int, recipe: Recipe) -> Tokens:
    """Returns the tokens of a corpus, of each domain where it is a mix, as many as the recipe needs.

    Sampled text is returned as it is.

    Raises:
      TwlaError: what `require_calibration` and `tokenize` refuse.
    """
    if isinstance(text, SampledText):
        return text
    drawn = recipe.calibration
    wanted = (drawn.windows + recipe.refine.windows) * drawn.seq_len
    return windows.domain_tokens(text, tokenizer, vocab_size, wanted)


def seen_windows(
    tokens: Tokens, recipe: Recipe
) -> tuple[Int32[np.ndarray, "w seq_len"], Int32[np.ndarray, "r seq_len"]]:
    """The windows of the calibration and those of the refinement, `refine.windows` of them.

    Those of a corpus are drawn with replacement, of a mix from its domains in turn; those of sampled text are its rows,
    in order.

    Raises:
      TwlaError: fewer tokens than one window.
    """
    drawn, more = recipe.calibration, recipe.refine.windows
    if isinstance(tokens, SampledText):
        return tokens.rows[: drawn.windows], tokens.rows[drawn.windows : drawn.windows + more]
    return (
        windows.sample_windows(tokens, drawn.windows, drawn.seq_len, drawn.seed),
        windows.sample_windows(tokens, more, drawn.seq_len, drawn.seed + 1),
    )


def held_out_windows(tokens: Tokens, recipe: Recipe) -> tuple[Int32[np.ndarray, "h t"], float]:
    """The windows that bits are allocated on, and the share of their tokens that `seen_windows` holds too.

    Raises:
      TwlaError: fewer tokens than one window, or too few sampled ones.
    """
    drawn, settings = recipe.calibration, recipe.allocation
    seq_len = settings.seq_len or drawn.seq_len
    if isinstance(tokens, SampledText):
        rows = tokens.rows[len(tokens.rows) - tokens.held_out :]
        if settings.windows > len(rows) or seq_len > rows.shape[1]:
            raise TwlaError(
                f"{settings.windows} windows of {seq_len} are wanted, but the model's own text has"
                f" {len(rows)} of {rows.shape[1]} that no calibration saw: lower --windows or --seq-len"
            )
        return rows[: settings.windows, :seq_len], 0.0
    seen = [drawn]
    if more := recipe.refine.windows:
        seen.append(dataclasses.replace(drawn, windows=more, seed=drawn.seed + 1))
    return windows.held_out_windows(tokens, seen, settings.windows, seq_len, seed=drawn.seed + 2)
