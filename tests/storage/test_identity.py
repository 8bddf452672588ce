"""Unfinished work is gone on with after any kill, and no file of other work, or of another part, is taken for it."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from twla_jax.allocation.choice import allocate_bits
from twla_jax.allocation.sensitivity import measure
from twla_jax.errors import TwlaError
from twla_jax.inference.self_sampling import sample_text
from twla_jax.jobs.stages import quantize
from twla_jax.quantization.pipeline import quantize_blocks
from twla_jax.refinement.blockwise import refine_blocks
from twla_jax.refinement.clip_training import train_clips
from twla_jax.refinement.end_to_end import refine
from twla_jax.storage.resume import WorkDir, keeps_work_dir

PARTS = {"codes": np.arange(6).reshape(2, 3), "x": np.arange(4).astype(ml_dtypes.bfloat16)}
DEEP = b"[" * 100_000


@pytest.fixture
def folder(tmp_path):
    """A working folder with two blocks."""
    store = WorkDir(tmp_path / "out.partial", "mine")
    for index in range(2):
        store.save(f"block-{index}", {**PARTS, "index": np.asarray(index)})
    return tmp_path / "out.partial"


def test_groups_come_back_as_they_were(folder):
    saved = WorkDir(folder, "mine").load("block-1")
    assert saved.keys() == {*PARTS, "index"}
    for name, array in PARTS.items():
        assert saved[name].dtype == array.dtype
        np.testing.assert_array_equal(saved[name], array)
    assert WorkDir(folder, "mine").load("block-2") is None


def test_work_on_something_else_is_refused(folder):
    with pytest.raises(TwlaError, match="another model, text or recipe"):
        WorkDir(folder, "other")


def test_a_group_under_another_name_is_refused(folder):
    shutil.copyfile(folder / "block-1.npz", folder / "block-0.npz")
    with pytest.raises(TwlaError, match=r"block-0.npz: belongs to another part"):
        WorkDir(folder, "mine").load("block-0")


def test_a_group_of_other_work_is_refused(folder, tmp_path):
    WorkDir(tmp_path / "other", "other").save("block-0", PARTS)
    shutil.copyfile(tmp_path / "other" / "block-0.npz", folder / "block-0.npz")
    with pytest.raises(TwlaError, match="belongs to another part of the work or to other work"):
        WorkDir(folder, "mine").load("block-0")


def damage(path, how):
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "no group":
        with path.open("wb") as file:
            np.savez(file, **PARTS)
    elif how == "one array":
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    elif how == "objects":
        with path.open("wb") as file:
            np.savez(file, codes=np.asarray([{}], object))
    elif how != "gone":
        path.write_bytes({"empty": b"", "cut": content[:-40], "text": b"{}", "deep": DEEP}[how])


@pytest.mark.parametrize(
    "how", ["empty", "cut", "text", "folder", "pipe", "no group", "one array", "objects", "gone"]
)
def test_a_group_that_cannot_be_read_is_refused_in_one_line(folder, how):
    damage(folder / "block-0.npz", how)
    with pytest.raises(TwlaError, match=r"block-0.npz: .* start again") as caught:
        WorkDir(folder, "mine").require("block-0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"sha256": 5}', b"\xff", DEEP])
def test_a_folder_that_does_not_say_whose_it_is_is_refused_in_one_line(folder, content):
    (folder / "fingerprint.json").write_bytes(content)
    with pytest.raises(TwlaError, match=r"fingerprint.json: damaged; remove"):
        WorkDir(folder, "mine")


@pytest.mark.parametrize("left", [".fingerprint.json.tmp", ".fingerprint.json.0123456789abcdef.tmp"])
@pytest.mark.parametrize("inside", ["out.partial", "out.partial/refine"])
def test_a_kill_before_the_first_file_blocks_nothing(tmp_path, left, inside):
    killed = tmp_path / inside
    killed.mkdir(parents=True)
    (killed / left).write_text("{")
    for folder in (tmp_path / "out.partial", tmp_path / "out.partial" / "refine"):
        WorkDir(folder, "mine").save("state", PARTS)
        assert WorkDir(folder, "mine").load("state").keys() == PARTS.keys()
        assert not list(folder.glob(".*"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / ".draft.tmp").write_text("one")
    with pytest.raises(TwlaError, match="holds no unfinished work"):
        WorkDir(tmp_path / "thesis", "mine")
    assert (tmp_path / "thesis" / ".draft.tmp").read_text() == "one"


def test_a_second_caller_of_one_folder_is_refused_and_a_nested_or_later_one_is_not(tmp_path):
    @keeps_work_dir
    def work(inner=None, *, work_dir=None):
        if work_dir is not None:
            WorkDir(work_dir, "mine").save("state", PARTS)
        return inner and inner()

    def refused():
        with pytest.raises(TwlaError, match=r"w: another run is writing it"):
            work(work_dir=tmp_path / "w")
        return True

    def elsewhere(call):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(call).result()

    assert work(lambda: elsewhere(refused), work_dir=tmp_path / "w")
    work(lambda: work(work_dir=tmp_path / "w"), work_dir=tmp_path / "w")
    work(lambda: work(work_dir=tmp_path / "w" / "refine"), work_dir=tmp_path / "w")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        *("fingerprint.json", "fingerprint.json", "refine", "state.npz", "state.npz", "w")
    ]
    work()


def test_the_lock_of_a_killed_call_inside_a_folder_is_no_foreign_file(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / ".refine.lock").touch()
    WorkDir(tmp_path / "w", "mine").save("state", PARTS)


def test_every_public_function_that_keeps_work_keeps_its_folder_to_itself():
    functions = [
        allocate_bits,
        measure,
        quantize,
        quantize_blocks,
        refine,
        refine_blocks,
        sample_text,
        train_clips,
    ]
    assert all(hasattr(function, "__wrapped__") for function in functions)
