"""Draws the default text, a mix of domains, each kept apart so that windows come from all in equal parts.

A model keeps what its calibration text contains. The domains come from the folder `TWLA_DATA` where it has them, else
from what Python and the machine carry. Every domain is cut into pieces of a few thousand characters in an order of
their hashes, so that any part of it is a fair sample of its documents.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from twla_jax.text import files, machine, named
from twla_jax.text.files import Document, Text
from twla_jax.text.named import Split

DOMAINS = ("chat", "code", "prose", "science", "stories", "german", "french", "spanish", "chinese")
_LANGUAGES = {"german": "de", "french": "fr", "spanish": "es", "chinese": "zh"}
LANGUAGES_FILE = "languages.jsonl"  # whose documents say which language they are in
_Record = tuple[Document, dict[str, Any]]
_PIECE = 12_000  # characters, a good window of tokens
_ONLINE_LETTERS = {"calibration": 4_000_000, "evaluation": 500_000}  # of a domain, at most


def domain(name: str, split: Split) -> Text | None:
    """Return one of `DOMAINS` from the folder `TWLA_DATA`, or None where it is not there."""
    return _domains([name], split).get(name)


def parts(split: Split) -> dict[str, Text]:
    """Return the domains of the mix by name: those that can be had without a network."""
    found = _domains(DOMAINS, split) or {
        "pydoc": named.pydoc(split),
        "stdlib": machine.stdlib(split),
        "notes": machine.notes(split),
        "languages": machine.languages(split),
    }
    if named.data_file("wikitext2", "wiki.valid.raw" if split == "calibration" else "wiki.test.raw"):
        found["wikitext2"] = named.wikitext2(split)
    if named.data_file("web", "c4_like_web.txt"):
        found["c4"] = named.c4(split)
    if split == "calibration":
        found = {
            name: text if name in DOMAINS else shuffled([text.text], text.source)
            for name, text in found.items()
        }
    return {name: text for name, text in found.items() if text.text.strip()}


def online_parts(split: Split) -> dict[str, Text]:
    """Return the domains of `mix-online` by name, the first documents of public data sets.

    Raises:
      TwlaError: the package `datasets` is not there, or a data set cannot be had.
    """
    found = {}
    for name, (path, settings, render) in _ONLINE.items():
        documents, letters = [], 0
        for document in named.online(
            "mix-online", path, split="train", streaming=True, render=render, **settings
        ):
            if named.for_evaluation(str(document)) == (split == "evaluation"):
                documents.append(document)
                letters += len(str(document))
            if letters >= _ONLINE_LETTERS[split]:
                break
        found[name] = shuffled(documents, path)
    return found


def _chat_of(row: dict[str, Any]) -> Document:
    keys = ("role", "content")
    return tuple({key: str(message[key]) for key in keys} for message in row["messages"])


# Of each domain a data set, how `datasets` is asked for it, and what of a row is its document.
_ONLINE: dict[str, tuple[str, dict[str, str], Callable[[Any], Document]]] = {
    "web": ("HuggingFaceFW/fineweb-edu", {"name": "sample-10BT"}, lambda row: row["text"]),
    "encyclopaedia": ("wikimedia/wikipedia", {"name": "20231101.en"}, lambda row: row["text"]),
    "code": ("codeparrot/codeparrot-clean-train", {}, lambda row: row["content"]),
    "chat": ("HuggingFaceTB/smol-smoltalk", {}, _chat_of),
    "stories": ("roneneldan/TinyStories", {}, lambda row: row["text"]),
    "science": ("openai/gsm8k", {"name": "main"}, lambda row: f"{row['question']}\n{row['answer']}"),
    **{
        name: ("wikimedia/wikipedia", {"name": f"20231101.{language}"}, lambda row: row["text"])
        for name, language in _LANGUAGES.items()
    },
}


def by_language(path: Path) -> dict[str, Text]:
    """Return the documents of a `.jsonl` file by their field `lang`."""
    names = {language: name for name, language in _LANGUAGES.items()}
    found: dict[str, list[Document]] = {}
    for document, record in files.read_records(files.read_lines(path), str(path)):
        language = str(record.get("lang", "other"))
        found.setdefault(names.get(language, language), []).append(document)
    return {
        name: files.from_documents(documents, f"{path}, lang {name}") for name, documents in found.items()
    }


def is_evaluation_file(path: Path) -> bool:
    """Return whether a path lies in the folder of evaluation texts of `TWLA_DATA`."""
    folder = os.environ.get("TWLA_DATA")
    return bool(folder) and path.resolve().is_relative_to(Path(folder, "domains", "valid").resolve())


def shuffled(documents: Iterable[Document], source: str) -> Text:
    """Return the documents' pieces in an order of their hashes; chats stay whole."""
    pieces: list[Document] = []
    for document in documents:
        pieces += _pieces(document) if isinstance(document, str) else [document]
    pieces.sort(key=lambda piece: hashlib.sha256(str(piece).encode()).digest())
    return files.from_documents(pieces, source)


def _pieces(document: str) -> list[str]:
    """Cut a document at ends of lines into pieces of about `_PIECE` characters."""
    pieces, start = [], 0
    while len(document) - start > 1.5 * _PIECE:
        end = document.find("\n", start + _PIECE) + 1 or start + _PIECE
        pieces.append(document[start:end])
        start = end
    return [piece for piece in (*pieces, document[start:]) if piece.strip()]


def _domains(names: Iterable[str], split: Split) -> dict[str, Text]:
    """Return those of the domains that the folder `TWLA_DATA` has, by name."""
    stems = {name: "languages" if name in _LANGUAGES else name for name in names}
    read = _evaluation_records if split == "evaluation" else _calibration_records
    records = read(set(stems.values()))
    found = {}
    for name, stem in stems.items():
        if stem in records:
            language = _LANGUAGES.get(name)
            documents = [text for text, record in records[stem] if language in (None, record.get("lang"))]
            if not documents:
                continue
            source = f"domains/{'valid' if split == 'evaluation' else 'train'}/{stem}.jsonl"
            if split == "evaluation":
                found[name] = files.from_documents(documents, source)
            else:
                found[name] = shuffled(documents, f"{source}, in pieces ordered by their hashes")
    return found


def _evaluation_records(stems: Iterable[str]) -> dict[str, list[_Record]]:
    paths = {stem: named.data_file("domains", "valid", f"{stem}.jsonl") for stem in stems}
    return {
        stem: files.read_records(files.read_lines(path), str(path)) for stem, path in paths.items() if path
    }


def _calibration_records(stems: Iterable[str]) -> dict[str, list[_Record]]:
    """Return the records of `domains/train/*.jsonl`, or where that is not unpacked of `domains/train.tar.xz`."""
    paths = {stem: named.data_file("domains", "train", f"{stem}.jsonl") for stem in stems}
    if found := {
        stem: files.read_records(files.read_lines(path), str(path)) for stem, path in paths.items() if path
    }:
        return found
    path = named.data_file("domains", "train.tar.xz")
    if path is None:
        return {}
    with tarfile.open(path) as archive:
        for member in archive:
            stem = Path(member.name).stem
            if stem in paths and member.name.endswith(".jsonl") and (opened := archive.extractfile(member)):
                lines = opened.read().decode("utf-8").split("\n")
                found[stem] = files.read_records(lines, f"{path}:{member.name}")
    return found
