"""Scores a model on several texts, beside the model that it was made from: its quality is that of the worst."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from twla_jax.errors import TwlaError
from twla_jax.evaluation import streamed
from twla_jax.evaluation.divergence import window_divergence
from twla_jax.evaluation.nll import window_nll
from twla_jax.evaluation.scoring import cut_windows, perplexity
from twla_jax.models import sharding
from twla_jax.models.config import check_vocabulary
from twla_jax.models.decoder import Decoder
from twla_jax.models.stored_layers import in_files
from twla_jax.progress import Bar


def evaluate_domains(
    model: Decoder,
    texts: Mapping[str, Int[np.ndarray, " t"] | Int[np.ndarray, "w seq_len"]],
    *,
    original: Decoder | None = None,
    seq_len: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
    chunk: int = 512,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a model on named texts, and with an `original` also how far its predictions are from that one's.

    Both models see the same windows in one pass. The result is the mean over all predictions of a text.

    Args:
      model: quantised or not.
      texts: tokens by name: a whole text, cut by `cut_windows`; or windows already cut, as long everywhere.
      original: the model to compare with, of the same vocabulary.
      seq_len: tokens in a window.
      max_windows: of each text, score only the first so many.
      batch_size: windows at a time.
      chunk: positions whose logits exist at the same time.
      mesh: as `evaluate` takes it.
      progress: a bar on stderr.
    Returns:
      `domains`, a row a text, from the best to the worst: `name`, `perplexity`, `nll`, `windows`, `tokens`; with an
      original also `original_perplexity`, `ratio` (of the two), `kl` (nats a token), and `agreement` (share of
      predictions whose likeliest token is the same). `worst`: the name of the last row. `seq_len`.
    Raises:
      TwlaError: no text, a text shorter than a window, a token outside the vocabulary, or another vocabulary.
    """
    if not texts:
        raise TwlaError("there is no text to evaluate on")
    size = model.config.vocab_size
    if original is not None and original.config.vocab_size != size:
        raise TwlaError(
            f"the two models have vocabularies of {size} and {original.config.vocab_size} tokens: one was not made"
            " from the other"
        )
    windows = {name: _windows(name, tokens, seq_len, max_windows, size) for name, tokens in texts.items()}
    if in_files((model, original)):
        rows = _streamed_rows(model, original, windows, chunk, mesh, progress)
    else:
        rows = _rows(model, original, windows, batch_size, chunk, mesh, progress)
    key = "ratio" if original is not None else "perplexity"
    rows.sort(key=lambda row: math.inf if math.isnan(row[key]) else row[key])
    return {"domains": rows, "worst": rows[-1]["name"], "seq_len": next(iter(windows.values())).shape[1]}


def format_domains(result: Mapping[str, Any]) -> str:
    """Return the figures of `evaluate_domains` as a table for a person, the worst text last."""
    rows = result["domains"]
    width = max(len("text"), *(len(row["name"]) for row in rows))
    compared = "ratio" in rows[0]
    head = f"{'text':{width}}{'tokens':>9}{'perplexity':>13}"
    lines = [head + (f"{'original':>11}{'KL':>8}{'same top-1':>12}{'ratio':>9}" if compared else "")]
    for row in rows:
        line = f"{row['name']:{width}}{row['tokens']:9}{row['perplexity']:13.2f}"
        if compared:
            line += f"{row['original_perplexity']:11.2f}{row['kl']:8.3f}{row['agreement']:12.1%}{row['ratio']:9.2f}"
        lines.append(line)
    return "\n".join(lines)


def _windows(name: str, tokens: np.ndarray, seq_len: int, most: int | None, size: int) -> np.ndarray:
    tokens = np.asanyarray(tokens)  # which may know of a BOS
    try:
        check_vocabulary(tokens, size)
        windows = (cut_windows(tokens, seq_len) if tokens.ndim == 1 else tokens.astype(np.int32))[:most]
        if windows.size == 0:
            raise TwlaError(f"max_windows {most}: there is no window to evaluate")
    except TwlaError as error:
        raise TwlaError(f"text '{name}': {error}") from None
    return windows


def _rows(
    model: Decoder,
    original: Decoder | None,
    windows: Mapping[str, np.ndarray],
    batch_size: int,
    chunk: int,
    mesh: jax.sharding.Mesh | None,
    progress: bool,
) -> list[dict[str, Any]]:
    # Host parameters move to the device once, not at every call.
    model = sharding.place(model, mesh)
    original = None if original is None else sharding.place(original, mesh)
    batch_size = sharding.batch_on(mesh, batch_size)
    total = sum(map(len, windows.values()))
    rows = []
    with Bar(total=total, desc="evaluate", unit="window", disable=not progress) as bar:
        for name, here in windows.items():
            bar.set_postfix(text=name)
            rows.append(_row(name, _means(model, original, here, batch_size, chunk, mesh, bar), here))
    return rows


def _streamed_rows(
    model: Decoder,
    original: Decoder | None,
    windows: Mapping[str, np.ndarray],
    chunk: int,
    mesh: jax.sharding.Mesh | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Return the rows of models whose layers are in files, which all texts go through together."""
    together = np.concatenate(list(windows.values()))
    found = streamed.window_figures(model, original, together, chunk=chunk, mesh=mesh, progress=progress)
    ends = np.cumsum([len(here) for here in windows.values()])[:-1]
    by_text = {name: np.split(values, ends) for name, values in found.items()}
    return [
        _row(text, {name: float(values[index].mean()) for name, values in by_text.items()}, here)
        for index, (text, here) in enumerate(windows.items())
    ]


def _means(
    model: Decoder,
    original: Decoder | None,
    windows: np.ndarray,
    batch_size: int,
    chunk: int,
    mesh: jax.sharding.Mesh | None,
    bar: Bar,
) -> dict[str, float]:
    totals: dict[str, float] = {}
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        # A short last batch is filled up, so that nothing compiles twice.
        filled = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
        filled = sharding.place_batch(filled, mesh)
        if original is None:
            found = {"nll": window_nll(model, filled, chunk=chunk)}
        else:
            found = window_divergence(model, original, filled, chunk=chunk)
        for name, values in found.items():
            totals[name] = totals.get(name, 0.0) + float(values[: len(batch)].sum())
        bar.update(len(batch))
    return {name: total / len(windows) for name, total in totals.items()}


def _row(name: str, means: dict[str, float], windows: np.ndarray) -> dict[str, Any]:
    row = {
        "name": name,
        "perplexity": perplexity(means["nll"]),
        "nll": means["nll"],
        "windows": len(windows),
        "tokens": int(windows.size),
    }
    if "original_nll" in means:
        row |= {
            "original_perplexity": perplexity(means["original_nll"]),
            "ratio": perplexity(means["nll"] - means["original_nll"]),
            "kl": means["kl"],
            "agreement": means["agreement"],
        }
    return row
