"""An export takes a free place, keeps it while it writes, and leaves nothing of a run that was killed."""

import contextlib
import resource

import pytest

from twla_jax.errors import TwlaError
from twla_jax.jobs import export_model as job
from twla_jax.storage import checkpoint, locks


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_a_place_is_kept_from_before_the_model_is_read(quantised_folder, tmp_path, format, monkeypatch):
    def write(out, place, *_):
        with pytest.raises(TwlaError, match="dest: another run is writing it"):
            other_run(lambda: job.export_model(quantised_folder, place, format=format))
        return {}, 16.0

    def other_run(call):  # whose thread holds nothing
        token = locks._HELD.set(frozenset())
        try:
            call()
        finally:
            locks._HELD.reset(token)

    monkeypatch.setattr(job, "_write", write)
    job.export_model(quantised_folder, tmp_path / "dest", format=format)
    assert names(tmp_path) == ["out"]


def test_what_a_killed_export_left_is_removed_by_the_next(quantised_folder, tmp_path):
    (tmp_path / ".st.0123456789abcdef.tmp").write_text("half a file")
    job.export_model(quantised_folder, tmp_path / "st", format="safetensors")
    assert names(tmp_path) == ["out", "st"]


def test_a_quantised_folder_is_not_written_into(quantised_folder, tmp_path):
    (tmp_path / "link").symlink_to(quantised_folder)
    before = names(quantised_folder)
    for dest in (quantised_folder / "hf", quantised_folder / "params" / "x", tmp_path / "link" / "hf"):
        with pytest.raises(TwlaError, match=r"lies in .* itself; name a place outside"):
            job.export_model(quantised_folder, dest, format="hf")
    assert names(quantised_folder) == before


@contextlib.contextmanager
def files_no_longer_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("format", ["hf", "gguf", "safetensors"])
def test_a_file_that_cannot_be_written_whole_leaves_nothing(quantised_folder, tmp_path, format, monkeypatch):
    """At every file: it may not begin, breaks off in the middle, or lacks its last byte."""
    model, tokenizer, info = checkpoint.load(quantised_folder)
    loaded = (model, None if format == "gguf" else tokenizer, info)  # GGUF has no form for words
    monkeypatch.setattr(job.checkpoint, "load", lambda out: loaded)
    whole = job.export_model(quantised_folder, tmp_path / "whole", format=format)["files"].values()
    for size in {0, *(size // 2 for size in whole), *(size - 1 for size in whole)}:
        with files_no_longer_than(size), pytest.raises(TwlaError) as refusal:
            job.export_model(quantised_folder, tmp_path / "dest", format=format)
        assert str(refusal.value).startswith(f"{tmp_path / 'dest'}: ")
        assert str(refusal.value).endswith("; nothing was written")
        assert names(tmp_path) == ["out", "whole"]
