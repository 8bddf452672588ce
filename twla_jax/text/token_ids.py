"""Holds token ids of a text that know whether windows of it begin with BOS.

A model whose tokenizer puts BOS before every text has seen it before every text: without it, it is another and worse
model. So a window of such a text is BOS and one token less of the text, in calibration, refinement and evaluation.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, Int32

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenIds(np.ndarray):
    """Token ids `[t]`, int32; `bos` is the id that windows begin with, None for none, and not among the ids."""

    bos: int | None = None

    def __array_finalize__(self, obj: Any) -> None:
        self.bos = getattr(obj, "bos", None)


def token_ids(ids: Int[np.ndarray, " t"], bos: int | None) -> TokenIds:
    """Return ids that begin with `bos`, or with the text itself, as ids of the text that remember it."""
    held = np.asarray(ids, np.int32)
    result = (held[1:] if bos is not None and held[:1] == bos else held).view(TokenIds)
    result.bos = bos
    return result


def added_bos(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the id that a tokenizer puts before every text by itself, if that is its BOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos] else None


def text_length(tokens: Int[np.ndarray, " t"], seq_len: int) -> int:
    """Return how many tokens of the text a window of `seq_len` holds."""
    return seq_len - (getattr(tokens, "bos", None) is not None)


def cut(
    tokens: Int[np.ndarray, " t"], starts: Int[np.ndarray, " w"], seq_len: int
) -> Int32[np.ndarray, "w n"]:
    """Return the windows of the text from these places on, each begun with BOS where the text wants it."""
    length = text_length(tokens, seq_len)
    windows = np.asarray(tokens, np.int32)[starts[:, None] + np.arange(length)]
    begins = np.full((len(windows), seq_len - length), getattr(tokens, "bos", 0) or 0, np.int32)
    return np.concatenate([begins, windows], axis=1)
