"""Finds texts by name: in every Python, in the folder `TWLA_DATA`, or online through the package `datasets`.

What calibrates and what evaluates are disjoint for every name.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from twla_jax.errors import TwlaError
from twla_jax.text.files import Text, read_text

Split = Literal["calibration", "evaluation"]

_C4_ONLINE_DOCUMENTS = 2048  # of the first validation shard, about what 128 windows of 2048 tokens want


def data_file(*parts: str) -> Path | None:
    """Return the path of a file in the folder `TWLA_DATA`, or None where there is no such file."""
    folder = os.environ.get("TWLA_DATA")
    path = Path(folder, *parts) if folder else None
    return path if path and path.is_file() else None


def for_evaluation(name: str) -> bool:
    """Return whether a document is for evaluation: a third of all, by a hash of its name, the same in every Python."""
    return hashlib.sha256(name.encode()).digest()[0] % 3 == 0


def pydoc(split: Split) -> Text:
    """Return CPython's help topics, a third of them for evaluation.

    Topics repeat one another (`compound` holds `if`, `while`, …), so a topic that shares a paragraph with a longer
    one is left out.
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
    chosen = [kept[topic] for topic in sorted(kept) if for_evaluation(topic) == (split == "evaluation")]
    return Text(text="\n\n".join(chosen), source="pydoc_data.topics of this Python", join="\n\n")


def wikitext2(split: Split) -> Text:
    """Return WikiText-2's validation split for calibration, its test split for evaluation."""
    part = "validation" if split == "calibration" else "test"
    file = "wiki.valid.raw" if split == "calibration" else "wiki.test.raw"
    return _wikitext2_part(part, [file])


def wikitext2_train(split: Split) -> Text:
    """Return WikiText-2's training split.

    Raises:
      TwlaError: it is asked for evaluation.
    """
    if split == "evaluation":
        raise TwlaError("corpus 'wikitext2-train' is for calibration only; evaluate on 'wikitext2'")
    return _wikitext2_part("train", ["wiki.train.raw", "wiki.train.head.raw"])


def _wikitext2_part(part: str, files: list[str]) -> Text:
    for file in files:
        if path := data_file("wikitext2", file):
            return Text(text=read_text(path), source=f"wikitext2/{file}")
    rows = online("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    # The published rows lack the blank lines' one space; with it the text is the raw file, byte for byte.
    text = "".join(row or " \n" for row in rows)
    return Text(text=text, source=f"Salesforce/wikitext wikitext-2-raw-v1 {part}")


def c4(split: Split) -> Text:
    """Return every other page of C4's validation split, the first half of them for calibration."""
    if path := data_file("web", "c4_like_web.txt"):
        documents, source = read_text(path).splitlines(), "web/c4_like_web.txt"
    else:
        shard = "en/c4-validation.00000-of-00008.json.gz"
        rows = online("c4", "allenai/c4", data_files=shard, split="train", streaming=True)
        documents = [row for row, _ in zip(rows, range(_C4_ONLINE_DOCUMENTS), strict=False)]
        source = f"allenai/c4 {shard}"
    documents = list(dict.fromkeys(documents))  # a page met twice must not land in both halves
    half = documents[0 if split == "calibration" else 1 :: 2]
    return Text(text="\n".join(half), source=source, join="\n")


NAMED: dict[str, Callable[[Split], Text]] = {
    "pydoc": pydoc,
    "wikitext2": wikitext2,
    "wikitext2-train": wikitext2_train,
    "c4": c4,
}


def online(
    corpus: str, *args: Any, render: Callable[[Any], Any] | None = None, **kwargs: Any
) -> Iterator[Any]:
    """Yield the documents of a data set of the package `datasets`: each row's `text`, or what `render` makes of it.

    Raises:
      TwlaError: the package is not there, or the data set cannot be had.
    """
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
    return (row["text"] if render is None else render(row) for row in rows)
