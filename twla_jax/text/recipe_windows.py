"""Draws the windows that a quantisation calibrates on, refines on, and allocates bits on."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, Int32

from twla_jax.errors import TwlaError
from twla_jax.recipe import Recipe
from twla_jax.text import windows
from twla_jax.text.corpora import Corpus
from twla_jax.text.sampled import SampledText
from twla_jax.text.token_ids import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stages read: marked text, which wants a tokenizer; tokens `[t]`; windows `[w, s]`, in the order of `DrawnText`.
Text = Corpus | SampledText | Int[np.ndarray, " t"] | Int[np.ndarray, "w s"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnText:
    """The windows that the stages of a recipe read.

    Attributes:
      calibration: what the layer-wise stages and the refinement block by block see.
      refinement: what the end-to-end refinement sees, and nothing else does; `recipe.refine.windows` of them.
      held_out: what bits are allocated on; None without a budget.
      overlap: share of the held-out tokens that the other windows hold too.
      description: of the text, JSON-ready.
      domains: the names of a mix's texts, from which the windows come in turn; empty for one text.
    """

    calibration: Int32[np.ndarray, "w s"]
    refinement: Int32[np.ndarray, "r s"]
    held_out: Int32[np.ndarray, "h t"] | None
    overlap: float
    description: dict[str, Any]
    domains: tuple[str, ...] = ()


def draw(
    text: Text,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase | None",
    vocab_size: int,
    *,
    held_out: bool = True,
) -> DrawnText:
    """Return the windows of every stage that a recipe names.

    Args:
      text: a corpus marked for calibration or sampled text, drawn from as the recipe says; tokens `[t]`, alike; or
        windows `[w, s]`: the last `allocation.windows` of them are held out where there is a budget, those before are
        the refinement's `refine.windows`, and all others calibrate.
      recipe: whose `calibration`, `refine` and `allocation` say how much is drawn.
      tokenizer: of a corpus; None for what is tokens already.
      vocab_size: of the model.
      held_out: False leaves the held-out windows out.

    Raises:
      TwlaError: too little text for a stage, or what `tokens_of` refuses.
    """
    if isinstance(text, Corpus | SampledText):
        tokens, description = tokens_of(text, tokenizer, vocab_size, recipe), text.describe()
    else:
        ids = np.asarray(text)
        if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
            raise TwlaError(f"text must be a corpus or token ids [t] or [w, s], not {ids.dtype} {ids.shape}")
        if ids.ndim == 2:
            return _split(ids.astype(np.int32), recipe, held_out)
        tokens = text if isinstance(text, TokenIds) else ids.astype(np.int32)
        description = {"name": "tokens", "split": "calibration"}
    calibration, refinement = seen_windows(tokens, recipe)
    kept, overlap = held_out_windows(tokens, recipe) if held_out else (None, 0.0)
    return DrawnText(
        calibration=calibration,
        refinement=refinement,
        held_out=kept,
        overlap=overlap,
        description=description,
        domains=tuple(part.name for part in text.parts) if isinstance(text, Corpus) else (),
    )


def _split(windows: np.ndarray, recipe: Recipe, held_out: bool) -> DrawnText:
    settings, more = recipe.allocation, recipe.refine.windows
    kept = settings.windows if held_out else 0
    if len(windows) <= more + kept:
        raise TwlaError(
            f"recipe '{recipe.name}' reads {more} windows to refine on and {kept} to allocate bits on, beside those to"
            f" calibrate on: {len(windows)} are too few"
        )
    seq_len = settings.seq_len or windows.shape[1]
    if kept and seq_len > windows.shape[1]:
        raise TwlaError(f"allocation.seq_len = {seq_len}: the windows have {windows.shape[1]} tokens")
    first, refined = len(windows) - more - kept, recipe.refine.end_to_end
    return DrawnText(
        calibration=windows[:first],
        refinement=windows[first : first + more, : refined.seq_len if refined and refined.seq_len else None],
        held_out=windows[first + more :, :seq_len] if kept else None,
        overlap=0.0,
        description={"name": "windows", "split": "calibration"},
    )


def count(recipe: Recipe) -> int:
    """Return how many windows a recipe wants in all, so that none is used twice."""
    return recipe.calibration.windows + recipe.refine.windows + recipe.allocation.windows


Tokens = windows.Tokens | SampledText


def tokens_of(
    text: Corpus | SampledText, tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int, recipe: Recipe
) -> Tokens:
    """Return the tokens of a corpus, of each domain where it is a mix, as many as the recipe needs.

    Sampled text is returned as it is.

    Args:
      text: a corpus, or what a model sampled.
      tokenizer: of the model.
      vocab_size: of the model.
      recipe: says how much is drawn.

    Raises:
      TwlaError: no tokenizer, or what `require_calibration` and `tokenize` refuse.
    """
    if isinstance(text, SampledText):
        return text
    if tokenizer is None:
        raise TwlaError("a corpus needs the model's tokenizer; without one, give tokens or windows")
    drawn = recipe.calibration
    wanted = (drawn.windows + recipe.refine.windows) * drawn.seq_len
    return windows.domain_tokens(text, tokenizer, vocab_size, wanted)


def seen_windows(
    tokens: Tokens, recipe: Recipe
) -> tuple[Int32[np.ndarray, "w seq_len"], Int32[np.ndarray, "r seq_len"]]:
    """Return the windows of the calibration and those of the refinement, `refine.windows` of them.

    Those of a corpus are drawn with replacement, of a mix from its domains in turn; those of sampled text are its rows,
    in order.

    Raises:
      TwlaError: fewer tokens than one window.
    """
    drawn, more, seq_len = recipe.calibration, recipe.refine.windows, refined_length(recipe)
    if isinstance(tokens, SampledText):
        return tokens.rows[: drawn.windows], tokens.rows[drawn.windows : drawn.windows + more, :seq_len]
    return (
        windows.sample_windows(tokens, drawn.windows, drawn.seq_len, drawn.seed),
        windows.sample_windows(tokens, more, seq_len, drawn.seed + 1),
    )


def refined_length(recipe: Recipe) -> int:
    """Return how many tokens a window of the end-to-end refinement has."""
    settings = recipe.refine.end_to_end
    return min(settings.seq_len if settings else 0, recipe.calibration.seq_len) or recipe.calibration.seq_len


def held_out_windows(tokens: Tokens, recipe: Recipe) -> tuple[Int32[np.ndarray, "h t"], float]:
    """Return the windows that bits are allocated on, and the share of their tokens that `seen_windows` holds too.

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
        seen.append(
            dataclasses.replace(drawn, windows=more, seq_len=refined_length(recipe), seed=drawn.seed + 1)
        )
    return windows.held_out_windows(tokens, seen, settings.windows, seq_len, seed=drawn.seed + 2)
