"""Measures perplexity on a text: windows that do not overlap, each scored from its own beginning."""

import math

import jax
import numpy as np
from jaxtyping import Int, Int32

from twla_jax.errors import TwlaError
from twla_jax.evaluation import streamed
from twla_jax.evaluation.nll import window_nll
from twla_jax.limits import check_number
from twla_jax.models import sharding
from twla_jax.models.arguments import checked_tokens, require_model
from twla_jax.models.config import check_length
from twla_jax.models.decoder import Decoder
from twla_jax.models.stored_layers import in_files
from twla_jax.progress import Bar
from twla_jax.text.token_ids import cut, text_length


def cut_windows(tokens: Int[np.ndarray, " t"], seq_len: int) -> Int32[np.ndarray, "w seq_len"]:
    """Return consecutive windows of `seq_len` tokens; the remainder is dropped.

    Where the tokenizer puts BOS before a text, each window is BOS and `seq_len − 1` tokens of the text.

    Raises:
      TwlaError: the text is shorter than one window, or `seq_len` leaves nothing to predict.
    """
    if seq_len < 2:
        raise TwlaError(f"seq_len {seq_len}: a window needs at least 2 tokens")
    length = text_length(tokens, seq_len)
    count = len(tokens) // length
    if count == 0:
        raise TwlaError(f"the text has {len(tokens)} tokens, fewer than one window of seq_len {seq_len}")
    return cut(tokens, np.arange(count) * length, seq_len)


def evaluate(
    model: Decoder,
    tokens: Int[np.ndarray, " t"] | Int[np.ndarray, "w seq_len"],
    *,
    seq_len: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
    chunk: int = 512,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> dict[str, float | int]:
    """Return the perplexity of `model`, `exp` of the mean negative log-likelihood of each window's predictions.

    Args:
      model: full precision or quantised, at its own activation bits.
      tokens: a whole text, cut by `cut_windows`; or windows already cut, whose length then replaces `seq_len`.
      seq_len: tokens in a window.
      max_windows: score only the first so many.
      batch_size: windows at a time.
      chunk: positions whose logits exist at the same time, per batch; `[b, t, vocab]` never exists whole.
      mesh: with axes `data` and `model`: windows are split over `data`, parameters as `sharding.shardings` says.
      progress: a bar with an estimate of the time left, on stderr.
    Returns:
      `perplexity`, `nll` (its logarithm, nats per token), `windows`, `tokens` (in these windows) and `seq_len`.
    Raises:
      TwlaError: as `cut_windows`; what `checked_tokens` refuses; a number is out of its range.
    """
    require_model(model)
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("chunk", chunk)):
        check_number(name, value)
    if max_windows is not None:
        check_number("max_windows", max_windows)
    # May know of a BOS, and stays what it is.
    tokens = checked_tokens(tokens, model.config, "tokens", ranks=(1, 2))
    windows = (cut_windows(tokens, seq_len) if tokens.ndim == 1 else tokens)[:max_windows]
    check_number("seq_len", windows.shape[1])
    check_length(windows.shape[1], model.config)
    if in_files(model):
        found = streamed.window_figures(model, None, windows, chunk=chunk, mesh=mesh, progress=progress)
        return _figures(float(found["nll"].sum()), windows)
    batch_size = sharding.batch_on(mesh, min(batch_size, len(windows)))
    # Host parameters move to the device once, not at every call.
    model = sharding.place(model, mesh)
    total = 0.0
    with Bar(total=len(windows), desc="evaluate", unit="window", disable=not progress) as bar:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            # A short last batch is filled up, so that nothing compiles twice.
            filled = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
            filled = sharding.place_batch(filled, mesh)
            total += float(window_nll(model, filled, chunk=chunk)[: len(batch)].sum())
            bar.update(len(batch))
            bar.set_postfix(perplexity=f"{perplexity(total / (start + len(batch))):.2f}")
    return _figures(total, windows)


def _figures(total: float, windows: np.ndarray) -> dict[str, float | int]:
    nll = total / len(windows)
    return {
        "perplexity": perplexity(nll),
        "nll": nll,
        "windows": len(windows),
        "tokens": int(windows.size),
        "seq_len": windows.shape[1],
    }


def perplexity(nll: float) -> float:
    """Return `exp(nll)`, infinite rather than an error where it overflows."""
    return math.exp(nll) if nll < 700 or math.isnan(nll) else math.inf
