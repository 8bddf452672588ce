"""Reads documents from files of a user's own: plain text, JSON Lines, JSON and CSV."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from twla_jax.errors import TwlaError

FIELD = "text"  # of a JSON object, or a column: what is read of a record
_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_OF_FOLDERS = (".txt", *_LINES)
# Suffixes whose files are no text, with what to do about it.
_REFUSED = {
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".pkl", ".pickle"), "write it as .jsonl first"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".zst", ".xz", ".bz2", ".7z"), "unpack it first"),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".epub"), "save it as .txt first"),
}


def read_documents(path: Path) -> tuple[str, str]:
    """Returns the text of a file or folder, and the string that was put between its documents.

    A file ending in `.jsonl` or `.ndjson` has an object a line, `.json` a list of objects, `.csv` and `.tsv` a table:
    of each the field `text` is read. Anything else is one document as it is. Capitals make no difference, a byte-order
    mark is no part of the text, and `.gz` behind these names is unpacked. Of a folder, `.txt`, `.jsonl` and `.ndjson`
    files are read, in the order of their names.

    Raises:
      TwlaError: a file that is no text, or a record without a text; names the file and the line.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _kind(file) in _OF_FOLDERS and file.is_file())
        if not files:
            raise TwlaError(f"{path}: no file of the kinds {', '.join(_OF_FOLDERS)} in this folder")
        return "\n\n".join(read_documents(file)[0] for file in files), "\n\n"
    kind = _kind(path)
    if kind in _REFUSED:
        raise TwlaError(f"{path}: {kind} files are not read; {_REFUSED[kind]}")
    if kind in _LINES:
        records: Iterable[tuple[str, Any]] = _lines(path)
    elif kind == ".json":
        records = _list(path)
    elif kind in _TABLES:
        records = _table(path, "," if kind == ".csv" else "\t")
    else:
        return read_text(path), ""
    return "\n\n".join(_text_of(record, place) for place, record in records), "\n\n"


def read_text(path: Path) -> str:
    """Returns the text of a file, without a byte-order mark, its line ends as they are.

    Raises:
      TwlaError: it cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TwlaError(f"{path}: not UTF-8 text") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise TwlaError(f"{path}: not a gzip file, or cut short") from None
    except OSError as error:
        raise TwlaError(f"{path}: {error.strerror}") from None


def _kind(path: Path) -> str:
    """Returns the suffix in lower case, without `.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Split at line feeds alone: inside a JSON string, U+2028 and its like are letters like others.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield (place := f"{path}, line {number}"), _json(line, place)


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from _lines(path)
        return
    for number, record in enumerate(_json(text, str(path)), 1):
        yield f"{path}, record {number}", record


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        if FIELD not in (columns := reader.fieldnames or []):
            raise TwlaError(f'{path}: no column "{FIELD}"{_known(columns)}')
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise TwlaError(f"{path}, line {reader.line_num}: not a table ({error})") from None


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise TwlaError(f"{place}: not JSON (nested too deeply)") from None
    except ValueError as error:
        raise TwlaError(f"{place}: not JSON ({error})") from None


def _text_of(record: Any, place: str) -> str:
    if not isinstance(record, dict):
        raise TwlaError(f'{place}: not a JSON object with a field "{FIELD}"')
    if FIELD not in record:
        raise TwlaError(f'{place}: no field "{FIELD}"{_known(record)}')
    text = record[FIELD]
    if not isinstance(text, str):
        kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
        raise TwlaError(f'{place}: the field "{FIELD}" is {kinds.get(type(text), "a number")}, not text')
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise TwlaError(f'{place}: the field "{FIELD}" holds half a surrogate pair, which is no character')
    return text


def _known(names: Iterable[Any]) -> str:
    shown = [repr(name)[:40] for name in names][:8]
    return f"; it has {', '.join(shown)}" if shown else ""
