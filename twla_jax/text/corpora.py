"""Text to token windows: corpora by name or path, each marked for calibration or for evaluation."""

import dataclasses
import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from twla_jax.errors import TwlaError
from twla_jax.text import files

Split = Literal["calibration", "evaluation"]

# The public wiki.test.raw: recognised by content, so that no path to it passes for calibration text.
WIKITEXT2_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
SELF = "self"  # text that the model samples itself; see `self_calibration`
_C4_ONLINE_DOCUMENTS = 2048  # of the first validation shard, about what 128 windows of 2048 tokens want


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A text with what is needed to find it again.

    Attributes:
      name: as it was asked for.
      split: what it may be used for.
      text: the whole text.
      source: where it was read from, in words.
      join: the string between its documents; empty for a text kept as the file has it.
    """

    name: str
    split: Split
    text: str
    source: str
    join: str = ""

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def describe(self) -> dict[str, str]:
        """What a report says of the corpus: everything but the text."""
        return {
            "name": self.name,
            "split": self.split,
            "source": self.source,
            "join": self.join,
            "sha256": self.sha256,
        }


def corpus_names() -> list[str]:
    """Names that `load_corpus` knows, beside paths and `name+name` mixes."""
    return list(_NAMED)


def load_corpus(name: str | Path, split: Split) -> Corpus:
    """Reads a corpus for one purpose; the texts of the two purposes are disjoint for every name.

    Args:
      name: `pydoc` (in every Python); `wikitext2`, `wikitext2-train` or `c4` (from the folder `TWLA_DATA`, else
        through the `datasets` package when online); the path of a file or folder that `files.read_documents` reads; or
        several of these joined by `+`, which are concatenated.
      split: `calibration` or `evaluation`. A path is taken at its word, save for WikiText-2's test split.
    Raises:
      TwlaError: an unknown name, `self`, which has no text before a model sampled it, a file that cannot be read as
        text, an empty corpus, or evaluation text asked for calibration.
    """
    parts = str(name).split("+")
    if not all(part.strip() for part in parts) and not (str(name).strip() and _exists(name)):
        raise TwlaError(
            f"corpus '{name}': a name is empty; it is a file, a folder or one of: {', '.join(_NAMED)}"
        )
    if SELF in map(str.strip, parts):
        raise TwlaError(
            "corpus 'self' is text that the model samples itself: for 'twla quantize --calibration self' alone,"
            " never for evaluation, and not with other texts"
        )
    if len(parts) > 1 and not _exists(name):
        corpora = [load_corpus(part.strip(), split) for part in parts]
        return Corpus(
            name=str(name),
            split=split,
            text="\n\n".join(corpus.text for corpus in corpora),
            source="; ".join(corpus.source for corpus in corpora),
            join="\n\n",
        )
    if str(name) in _NAMED:
        text, source, join = _NAMED[str(name)](split)
    elif _exists(name):
        text, join = files.read_documents(Path(name))
        source = str(name)
    else:
        raise TwlaError(
            f"corpus '{name}' is neither a file, a folder nor one of: {', '.join(corpus_names())}"
        )
    if not text.strip():
        raise TwlaError(f"corpus '{name}' ({source}) is empty")
    corpus = Corpus(name=str(name), split=split, text=text, source=source, join=join)
    if split == "calibration" and corpus.sha256 == WIKITEXT2_TEST_SHA256:
        raise TwlaError(f"corpus '{name}' is WikiText-2's test split, which is for evaluation only")
    return corpus


def require_calibration(corpus: Corpus) -> Corpus:
    """The corpus itself when it is marked for calibration.

    Raises:
      TwlaError: it is marked for evaluation; no setting may ever be chosen on such text.
    """
    if corpus.split != "calibration":
        raise TwlaError(f"corpus '{corpus.name}' is marked for {corpus.split} and cannot be calibrated on")
    return corpus


def tokenize(corpus: Corpus, tokenizer: Any, vocab_size: int) -> Int32[np.ndarray, " t"]:
    """Token ids of the whole text at once, with the special tokens that the tokenizer adds by itself.

    Raises:
      TwlaError: an id that the model's vocabulary lacks: this is another model's tokenizer.
    """
    tokens = np.asarray(tokenizer(corpus.text, verbose=False)["input_ids"], np.int32)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise TwlaError(
            f"corpus '{corpus.name}' has token id {tokens.max()}, but the model's vocabulary ends at {vocab_size - 1}"
        )
    return tokens


def _exists(name: str | Path) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _pydoc(split: Split) -> tuple[str, str, str]:
    """CPython's help topics, a third of them for evaluation.

    Topics repeat one another (`compound` holds `if`, `while`, …), so a topic that shares a paragraph with a longer
    one is left out; the rest are split by a hash of their names, which holds from one Python to the next.
    """
    module = importlib.import_module("pydoc_data.topics")
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for topic in sorted(module.topics, key=lambda topic: (-len(module.topics[topic]), topic)):
        paragraphs = {" ".join(paragraph.split()) for paragraph in module.topics[topic].split("\n\n")}
        paragraphs = {paragraph for paragraph in paragraphs if len(paragraph) >= 80}
        if not paragraphs & seen:
            seen |= paragraphs
            kept[topic] = module.topics[topic].strip()
    chosen = [
        kept[topic]
        for topic in sorted(kept)
        if (hashlib.sha256(topic.encode()).digest()[0] % 3 == 0) == (split == "evaluation")
    ]
    return "\n\n".join(chosen), "pydoc_data.topics of this Python", "\n\n"


def _wikitext2(split: Split) -> tuple[str, str, str]:
    part = "validation" if split == "calibration" else "test"
    file = "wiki.valid.raw" if split == "calibration" else "wiki.test.raw"
    return _wikitext2_part(part, [file])


def _wikitext2_train(split: Split) -> tuple[str, str, str]:
    if split == "evaluation":
        raise TwlaError("corpus 'wikitext2-train' is for calibration only; evaluate on 'wikitext2'")
    return _wikitext2_part("train", ["wiki.train.raw", "wiki.train.head.raw"])


def _wikitext2_part(part: str, names: list[str]) -> tuple[str, str, str]:
    for file in names:
        if path := _data_file("wikitext2", file):
            return files.read_text(path), f"wikitext2/{file}", ""
    rows = _online("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    # The published rows lack the blank lines' one space; with it the text is the raw file, byte for byte.
    return "".join(row or " \n" for row in rows), f"Salesforce/wikitext wikitext-2-raw-v1 {part}", ""


def _c4(split: Split) -> tuple[str, str, str]:
    if path := _data_file("web", "c4_like_web.txt"):
        documents, source = files.read_text(path).splitlines(), "web/c4_like_web.txt"
    else:
        shard = "en/c4-validation.00000-of-00008.json.gz"
        rows = _online("c4", "allenai/c4", data_files=shard, split="train", streaming=True)
        documents = [row for row, _ in zip(rows, range(_C4_ONLINE_DOCUMENTS), strict=False)]
        source = f"allenai/c4 {shard}"
    documents = list(dict.fromkeys(documents))  # a page met twice must not land in both halves
    return "\n".join(documents[0 if split == "calibration" else 1 :: 2]), source, "\n"


_NAMED: dict[str, Callable[[Split], tuple[str, str, str]]] = {
    "pydoc": _pydoc,
    "wikitext2": _wikitext2,
    "wikitext2-train": _wikitext2_train,
    "c4": _c4,
}


def _data_file(*parts: str) -> Path | None:
    folder = os.environ.get("TWLA_DATA")
    path = Path(folder, *parts) if folder else None
    return path if path and path.is_file() else None


def _online(corpus: str, *args: Any, **kwargs: Any) -> Iterator[str]:
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except ImportError:
        raise TwlaError(
            f"corpus '{corpus}' needs the folder TWLA_DATA or the package `datasets`; 'pydoc' needs neither"
        ) from None
    try:
        rows = load_dataset(*args, **kwargs)
    except Exception as error:  # the package's own errors are many; all mean that the text could not be had
        raise TwlaError(
            f"corpus '{corpus}' could not be fetched: {' '.join(str(error).split())[:200]}"
        ) from None
    return (row["text"] for row in rows)
