"""A folder from a stranger is read as it was saved or refused in one line, whatever its descriptions say."""

import contextlib
import copy
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twla_jax.errors import TwlaError
from twla_jax.jobs import allocate_bits
from twla_jax.recipe import CalibrationSettings, Recipe
from twla_jax.storage import accounting, checkpoint, manifest
from twla_jax.text import sampled

REPORT = {"model": {"name": "tiny"}}
DEEP = b'{"a":' + b"[" * 100_000
_FIRST = []


@pytest.fixture
def saved(tiny_ternary, tmp_path, tmp_path_factory):
    """A quantised folder with tables beside the model: saved once, copied for each test."""
    if not _FIRST:
        _FIRST.append(tmp_path_factory.mktemp("strangers") / "out")
        checkpoint.save(tiny_ternary, None, _FIRST[0], Recipe(), REPORT, extra={"ila_amp.json": "{}"})
    return shutil.copytree(_FIRST[0], tmp_path / "out")


def seal(folder, description):
    """Writes a manifest with its checksum, as somebody with intent would."""
    description["checksum"] = manifest.checksum(description)
    (folder / "twla.json").write_text(json.dumps(description))


def refused(folder, message, read=checkpoint.load):
    with pytest.raises(TwlaError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["tokenizer/added_tokens.json", "params/x", "self_calibration.npy", "config.json"]
)
def test_a_file_that_was_not_saved_but_would_be_read_is_refused(saved, name):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text("{}")
    refused(saved, "was not saved with the model, but would be read")


def test_a_users_own_files_stay_through_changes_and_are_not_overwritten(saved, tiny_ternary):
    (saved / "notes.md").write_text("mine")
    model, _, info = checkpoint.load(saved)
    checkpoint.revise(saved, model, info.recipe, {"model": {}}, {"ila_amp.json": "{}"})
    assert (saved / "notes.md").read_text() == "mine"
    assert checkpoint.load(saved)[2].report == {"model": {}}
    with pytest.raises(TwlaError, match=r"notes.md: was not written by twla and would be lost"):
        checkpoint.save(tiny_ternary, None, saved, Recipe(), REPORT, overwrite=True)
    assert (saved / "notes.md").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["../escaped.txt", "/escaped", "a/b", "..", "", ".hidden", "twla.json", "Report.json"]
)
def test_extra_files_have_names_of_their_own_in_the_folder(tiny_ternary, tmp_path, name):
    with pytest.raises(TwlaError, match="extra file"):
        checkpoint.save(tiny_ternary, None, tmp_path / "a" / "out", Recipe(), REPORT, extra={name: "x"})
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_machine_is_saved_and_the_same_model_gives_the_same_bytes(
    saved, tiny_ternary, tmp_path
):
    checkpoint.save(tiny_ternary, None, tmp_path / "again", Recipe(), REPORT, extra={"ila_amp.json": "{}"})
    first = {path.relative_to(saved): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    again = tmp_path / "again"
    assert first == {
        path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()
    }
    assert not [name for name, content in first.items() if b"/tmp" in content or b"strangers" in content]


EDITS = [
    (lambda m: m.update(files={}), "does not have the bytes of its shape|lists no report"),
    (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}), "lies in no such folder"),
    (
        lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        "lies in no such folder",
    ),
    (lambda m: m.update(tensors=5), "tensors is not what this version writes"),
    (lambda m: m["config"].update(num_layers=10**9), "num_layers|layers"),
    (lambda m: m["config"].update(num_layers=4), "is not of 4 layers"),
    (lambda m: m["config"].update(rms_norm_eps=float("nan")), "cut short or changed|rms_norm_eps"),
    (lambda m: m["config"].update(hidden_size="42"), "hidden_size"),
    (lambda m: m["config"].update(vocab_size=98), "embed"),
    (lambda m: m["config"].update(unknown=1), "config"),
    (lambda m: m["tensors"]["norm.scale"]["arrays"][""].update(dtype="bfloat16"), "describes another array"),
    (lambda m: m["tensors"]["norm.scale"]["arrays"][""].update(dtype="object"), "tensors is not"),
    (lambda m: m["tensors"]["norm.scale"].update(kind="ternary"), "do not fit together"),
    (lambda m: m["tensors"]["blocks.q.kernel"]["static"].update(in_features=41), "the model's"),
    (lambda m: m["tensors"]["blocks.q.kernel"]["static"].update(group_size=0), "do not fit together"),
    (lambda m: m["tensors"].pop("norm.scale"), "describes no norm.scale"),
    (lambda m: m["tensors"].update({"blocks.x.y": m["tensors"]["blocks.q.kernel"]}), "blocks.x.y"),
    (lambda m: m["recipe"].update(name=5), "name"),
    (lambda m: m.update(format_version=[]), "format"),
]


@pytest.mark.parametrize("index", range(len(EDITS)))
def test_a_description_that_does_not_fit_is_refused_in_one_line(saved, index):
    edit, message = EDITS[index]
    description = json.loads((saved / "twla.json").read_text())
    edit(description)
    seal(saved, description)
    refused(saved, message)


@pytest.mark.parametrize("name", ["twla.json", "report.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", DEEP, b'"x"'])
def test_json_of_any_kind_is_refused_in_one_line(saved, name, content):
    (saved / name).write_bytes(content)
    refused(saved, name)
    if name == "report.json":
        refused(saved, name, manifest.read_report)
    else:
        refused(saved, name, accounting.account)


TABLE = {"choices": [4, 8], "costs": [[1.0, 0.0]], "interactions": [], "base_loss": 1.0, "effort": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        DEEP,
        b"{}",
        b'{"clips": {}}',
        b'{"clips": 1, "tables": {}}',
        b'{"clips": {"qkv": [[1, 1, 1]]}, "tables": {}}',
        b'{"clips": {}, "tables": {"input": 5}}',
        b'{"clips": {}, "tables": {"input": {"fingerprint": "0", "table": 5}}}',
        b'{"clips": {}, "tables": {"input": {"fingerprint": "0", "table": {"choices": 1}}}}',
    ],
)
def test_tables_of_any_kind_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "ila_amp.json").write_bytes(content)
    refused(tmp_path / "ila_amp.json", r"ila_amp.json: ", allocate_bits.read_tables)


@pytest.mark.parametrize(
    "rows", [np.zeros(3, int), np.zeros((3, 4)), np.zeros((1, 4), int), np.asarray([{}])]
)
def test_text_that_is_no_rows_of_tokens_is_refused(tmp_path, rows):
    np.save(tmp_path / sampled.FILE, rows, allow_pickle=True)
    with pytest.raises(TwlaError, match="holds no rows of tokens"):
        sampled.read(tmp_path, CalibrationSettings(windows=2, seq_len=4))


def places(value, path=()):
    """The path of every value inside nested JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_description_ends_in_an_error_that_is_not_ours(saved, data):
    description = json.loads((_FIRST[0] / "twla.json").read_text())
    changed = copy.deepcopy(description)
    *parents, last = data.draw(st.sampled_from([path for path in places(description) if path]))
    inside = changed
    for key in parents:
        inside = inside[key]
    inside[last] = data.draw(JSON)
    try:
        seal(saved, changed)
    except (ValueError, UnicodeError):
        return
    with contextlib.suppress(TwlaError):
        accounting.account(saved)
