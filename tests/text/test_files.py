"""Documents are read as their kind of file means them; what is no text is refused with its place."""

import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from twla_jax.errors import TwlaError
from twla_jax.text import corpora, files, packed_files

BOM = b"\xef\xbb\xbf"
SEPARATORS = "one\u2028two\u0085three\x0cfour\x1cfive"  # at all of these str.splitlines splits


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def read(path, content):
    path.write_bytes(content)
    return corpora.load_corpus(path, "calibration").text


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.Json", "a.json"])
def test_json_lines_are_one_document_each(tmp_path, name):
    assert read(tmp_path / name, lines({"text": SEPARATORS}, {"text": "b", "id": 1})) == f"{SEPARATORS}\n\nb"


def test_a_json_list_is_one_document_a_record(tmp_path):
    content = json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode()
    assert read(tmp_path / "a.json", content) == "a\n\nb"


@pytest.mark.parametrize(
    ("name", "dialect"), [("a.csv", "excel"), ("a.CSV", "excel"), ("a.tsv", "excel-tab")]
)
def test_a_table_has_a_column_of_texts(tmp_path, name, dialect):
    long = "d" * 200_000
    with (tmp_path / name).open("w", newline="") as file:
        rows = [["id", "text"], [1, 'a, "quoted"\nline'], [2, "b\tc"], [3, long]]
        csv.writer(file, dialect).writerows(rows)
    text = corpora.load_corpus(tmp_path / name, "evaluation").text
    assert text == f'a, "quoted"\nline\n\nb\tc\n\n{long}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"a"),
        ("a.jsonl", lines({"text": "a"})),
        ("a.json", b'[{"text": "a"}]'),
        ("a.csv", b"text\na\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, content):
    assert read(tmp_path / name, BOM + content) == "a"


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.{}.gz", gzip.compress), ("a.{}.GZ", gzip.compress), ("a.{}.zst", zstandard.compress)],
)
def test_packed_files_are_unpacked(tmp_path, name, pack):
    assert read(tmp_path / name.format("txt"), pack(b"a")) == "a"
    assert read(tmp_path / name.format("jsonl"), pack(lines({"text": "b"}))) == "b"
    assert read(tmp_path / name.format("txt"), pack(b"a") + pack(b"b")) == "ab"  # as `cat` joins them


@pytest.mark.parametrize("field", ["text", "content"])
def test_a_record_is_read_by_the_first_field_that_it_has(tmp_path, field):
    other = {"content": "no"} if field == "text" else {}
    assert read(tmp_path / "a.jsonl", lines({"id": 1, field: "yes", **other})) == "yes"


def test_chats_in_any_kind_of_table_are_chats(tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [1, 2], "messages": [said, said[:1]]}), tmp_path / "a.parquet"
    )
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": said}, {"messages": said[:1], "content": "no"}))
    for name in ("a.parquet", "a.jsonl"):
        corpus = corpora.load_corpus(tmp_path / name, "calibration")
        assert corpus.chats == (tuple(said), tuple(said[:1]))
        assert corpus.text == "User: a\nAssistant: b\n\nUser: a"


def test_a_parquet_file_is_a_column_of_texts(tmp_path):
    texts = [f"text {i}" for i in range(2000)]
    table = pyarrow.table({"url": ["x"] * 2000, "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert corpora.load_corpus(tmp_path / "a.parquet", "calibration").text == "\n\n".join(texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(TwlaError, match=r'b\.parquet, row 2: the field "text" is null'):
        corpora.load_corpus(tmp_path / "b.parquet", "calibration")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(TwlaError, match=r"no column .*; it has 'body'"):
        corpora.load_corpus(tmp_path / "c.parquet", "calibration")


@pytest.mark.parametrize(
    ("package", "name", "extra"), [("zstandard", "a.zst", "zstd"), ("pyarrow", "a.parquet", "datasets")]
)
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, package, name, extra):
    monkeypatch.setattr(packed_files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TwlaError, match=rf"needs {package}: pip install 'twla-jax\[{extra}\]'"):
        read(tmp_path / name, b"")


@pytest.mark.parametrize("name", ["content", "messages"])
def test_published_fields_are_read_without_being_named(cases, name):
    assert corpora.load_corpus(cases / "text" / f"{name}.jsonl", "calibration").text.strip()


def test_a_folder_reads_its_texts_whatever_their_capitals(tmp_path):
    (tmp_path / "a.TXT").write_bytes(BOM + b"one")
    (tmp_path / "b.Jsonl").write_bytes(lines({"text": "two"}))
    (tmp_path / "c.json").write_text("{}")
    assert corpora.load_corpus(tmp_path, "calibration").text == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines({"text": "a"}, {"text": None}), 'line 2: the field "text" is null, not text'),
        ("a.jsonl", lines({"text": ["a"]}), "line 1: .* is a list, not text"),
        ("a.jsonl", lines({"text": 5}), "line 1: .* is a number, not text"),
        ("a.jsonl", lines({"text": True}), "line 1: .* is true or false, not text"),
        ("a.jsonl", lines({"text": {}}), "line 1: .* is an object, not text"),
        (
            "a.jsonl",
            lines({"messages": [], "source": "x"}),
            'line 1: the field "messages" is no list of objects',
        ),
        (
            "a.jsonl",
            lines({"body": "a", "id": 1}),
            'line 1: no field "text", "messages" or "content"; it has \'body\', \'id\'',
        ),
        ("a.jsonl", lines({"content": None}), 'line 1: the field "content" is null, not text'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .* half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON .nested too deeply"),
        ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", "line 1: "),
        ("a.json", b'[{"text": "a"}, "b"]', "record 2: not a JSON object"),
        ("a.json", b'{"data": {', "line 1: not JSON"),
        ("a.csv", b"body,id\na,1\n", 'no column "text", "messages" or "content"; it has \'body\', \'id\''),
        ("a.csv", b"id,text\n1\n", "line 2: .* is null, not text"),
        ("a.csv", b"text\nfirst\nHello, world\n", "line 3: has 1 columns more than the first line"),
        ("a.txt", "UTF-16".encode("utf-16-le"), "holds null bytes: it is UTF-16, or no text"),
        ("a.csv", b"", 'no column "text"'),
        ("a.csv", b'text\n"a', "not a table"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
        ("a.arrow", b"ARROW1", "arrow files are not read; write it as .jsonl first"),
        ("a.txt.zst", b"text", "not a zstd file, or cut short"),
        ("a.txt.zst", zstandard.compress(b"text" * 99)[:-5], "not a zstd file, or cut short"),
        ("a.txt.xz", b"", "xz files are not read; unpack it first"),
        ("a.txt.gz", b"text", "not a gzip file, or cut short"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-9], "not a gzip file, or cut short"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place_in_one_line(tmp_path, name, content, message):
    with pytest.raises(TwlaError, match=message) as caught:
        read(tmp_path / name, content)
    assert str(caught.value).isprintable()
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", "+", "pydoc+", "+pydoc", "a++b", "a\0b", "x" * 5000])
def test_an_empty_or_impossible_name_reads_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("not to be read")
    with pytest.raises(TwlaError, match="corpus"):
        corpora.load_corpus(name, "evaluation")


def test_what_is_no_file_or_unpacks_without_end_is_refused_at_once(tmp_path, monkeypatch):
    for name in ("pipe.txt", "pipe.parquet"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "pointer.txt").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(bytes(10_000)))
    monkeypatch.setattr(files, "_MOST", 9_999)
    for path, message in (
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "pipe.txt", "not a regular file"),
        (tmp_path / "pipe.parquet", "not a regular file"),
        (tmp_path / "pointer.txt", "is a git-lfs pointer"),
        (tmp_path / "bomb.txt.gz", "unpacks to more than"),
    ):
        with pytest.raises(TwlaError, match=message):
            files.read(path)
