"""Reads documents from files of a user's own: plain text, JSON Lines, JSON and CSV."""

import csv
import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.json_files import require_file
from twla_jax.text import packed_files

_CHAT = "messages"
FIELDS = (
    "text",
    _CHAT,
    "content",
)  # of a JSON object, or columns: the first that is there is read of a record
_LINES, _TABLES, _PARQUET = (".jsonl", ".ndjson"), (".csv", ".tsv"), ".parquet"
_MOST = 4 << 30  # bytes that a packed file may unpack to: a few may stand for any number
_PIECE = 1 << 20
_OF_FOLDERS = (".txt", *_LINES)
# Suffixes whose files are no text, with what to do about it.
_REFUSED = {
    **dict.fromkeys((".arrow", ".feather", ".pkl", ".pickle"), "write it as .jsonl first"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".xz", ".bz2", ".7z"), "unpack it first"),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".epub"), "save it as .txt first"),
}


Messages = tuple[dict[str, str], ...]  # of a chat, each with `role` and `content`
Document = str | Messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A text as it was read, not yet marked for a purpose.

    Attributes:
      text: the whole text.
      source: where it was read from, in words.
      join: the string between its documents; empty for a text kept as the file has it.
      chats: its documents where all of them are chats; a tokenizer with a chat template renders them its own way.
    """

    text: str
    source: str
    join: str = ""
    chats: tuple[Messages, ...] = ()


def read(path: Path) -> Text:
    """Return the text of a file or folder, its documents joined by an empty line.

    A file ending in `.jsonl` or `.ndjson` has an object a line, `.json` a list of objects, `.csv`, `.tsv` and
    `.parquet` a table: of each record the field `text` is read, else the chat in its field `messages`, else its field
    `content`. Anything else is one document as it is. Capitals make no difference, a byte-order mark is no part of the
    text, and `.gz` or `.zst` behind these names is unpacked. Of a folder, `.txt`, `.jsonl` and `.ndjson` files are
    read, in the order of their names.

    Raises:
      TwlaError: a file that is no text, or a record without a text; names the file and the line.
    """
    if path.is_dir():
        texts = [read(file) for file in text_files(path)]
        return Text(text="\n\n".join(text.text for text in texts), source=str(path), join="\n\n")
    records = _records(path)
    if records is None:
        return Text(text=read_text(path), source=str(path))
    return from_documents((_document(record, place) for place, record in records), str(path))


def text_files(folder: Path) -> list[Path]:
    """Return the files of a folder that `read` takes for its text, in the order of their names.

    Raises:
      TwlaError: there is none.
    """
    files = sorted(file for file in folder.rglob("*") if _kind(file) in _OF_FOLDERS and file.is_file())
    if not files:
        raise TwlaError(f"{folder}: no file of the kinds {', '.join(_OF_FOLDERS)} in this folder")
    return files


def from_documents(documents: Iterable[Document], source: str) -> Text:
    """Return documents as one text; they count as chats where all of them are."""
    documents = list(documents)
    chats = tuple(document for document in documents if not isinstance(document, str))
    plain = (document if isinstance(document, str) else _plain_chat(document) for document in documents)
    return Text(
        text="\n\n".join(plain),
        source=source,
        join="\n\n",
        chats=chats if len(chats) == len(documents) else (),
    )


def read_records(lines: Iterable[str], source: str) -> list[tuple[Document, dict[str, Any]]]:
    """Return the documents of JSON lines, each with all that its line says.

    Raises:
      TwlaError: a line without a text; names `source` and the line.
    """
    return [(_document(record, place), record) for place, record in _parsed(lines, source)]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file, which end at line feeds alone."""
    # Inside a JSON string, U+2028 and its like are letters like others.
    return read_text(path).split("\n")


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte-order mark, its line ends as they are.

    Raises:
      TwlaError: it cannot be read, or is not UTF-8.
    """
    try:
        require_file(path)  # a device may have no end, and a pipe no beginning
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as packed:
                content = _joined(iter(lambda: packed.read(_PIECE), b""), path)
        elif path.suffix.lower() == ".zst":
            content = _joined(packed_files.unpack_zstandard(path), path)
        else:
            content = path.read_bytes()
        text = content.decode("utf-8-sig")
        if "\0" in text:  # letters of UTF-16 look so
            raise TwlaError(f"{path}: holds null bytes: it is UTF-16, or no text; save it as UTF-8")
        return text
    except UnicodeDecodeError:
        raise TwlaError(f"{path}: not UTF-8 text") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise TwlaError(f"{path}: not a gzip file, or cut short") from None
    except OSError as error:
        raise TwlaError(f"{path}: {error.strerror}") from None


def _joined(parts: Iterable[bytes], path: Path) -> bytes:
    """Return what a file unpacks to, piece by piece, if that has an end."""
    result = bytearray()
    for part in parts:
        result += part
        if len(result) > _MOST:
            raise TwlaError(
                f"{path}: unpacks to more than {_MOST / 2**30:.0f} GiB; cut it into several files"
            )
    return bytes(result)


def _kind(path: Path) -> str:
    """Return the suffix in lower case, without `.gz` or `.zst`."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return Path(name).suffix


def _records(path: Path) -> Iterable[tuple[str, Any]] | None:
    """Return the records of a file with the place of each, None where the file is one document as it is."""
    kind = _kind(path)
    if kind in _REFUSED:
        raise TwlaError(f"{path}: {kind} files are not read; {_REFUSED[kind]}")
    if kind in _LINES:
        return _parsed(read_lines(path), str(path))
    if kind == ".json":
        return _list(path)
    if kind in _TABLES:
        return _table(path, "," if kind == ".csv" else "\t")
    if kind == _PARQUET:
        return packed_files.parquet_records(path, lambda names: _field(names, str(path), "column"))
    return None


def _parsed(lines: Iterable[str], source: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield (place := f"{source}, line {number}"), _json(line, place)


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from _parsed(text.split("\n"), str(path))
        return
    for number, record in enumerate(_json(text, str(path)), 1):
        yield f"{path}, record {number}", record


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a document may be longer than its default
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        _field(reader.fieldnames or [], str(path), "column")
        for row in reader:
            if None in row:  # the rest of a text with commas in it that is not in quotes
                more = len(row[None])
                raise TwlaError(
                    f"{path}, line {reader.line_num}: has {more} columns more than the first line"
                )
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


def _document(record: Any, place: str) -> Document:
    if not isinstance(record, dict):
        raise TwlaError(f'{place}: not a JSON object with a field "{FIELDS[0]}"')
    field = _field(record, place, "field")
    return _chat(record[field], place) if field == _CHAT else _checked(record[field], field, place)


def _field(names: Collection[Any], place: str, kind: str) -> str:
    """Return which of the names is read."""
    for field in FIELDS:
        if field in names:
            return field
    wanted = ", ".join(f'"{field}"' for field in FIELDS[:-1])
    raise TwlaError(f'{place}: no {kind} {wanted} or "{FIELDS[-1]}"{_known(names)}')


def _chat(messages: Any, place: str) -> Messages:
    keys = ("role", "content")
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and m.keys() >= set(keys) for m in messages)
    ):
        raise TwlaError(f'{place}: the field "{_CHAT}" is no list of objects with "role" and "content"')
    return tuple({key: _checked(message[key], key, place) for key in keys} for message in messages)


def _plain_chat(messages: Messages) -> str:
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _checked(text: Any, field: str, place: str) -> str:
    if not isinstance(text, str):
        kinds = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
        raise TwlaError(f'{place}: the field "{field}" is {kinds.get(type(text), "a number")}, not text')
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise TwlaError(f'{place}: the field "{field}" holds half a surrogate pair, which is no character')
    return text


def _known(names: Iterable[Any]) -> str:
    shown = [repr(name)[:40] for name in names][:8]
    return f"; it has {', '.join(shown)}" if shown else ""
