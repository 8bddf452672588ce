"""A folder is replaced whole or not at all, by one run at a time, and what killed runs left is cleared up."""

import _thread
import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from twla_jax.errors import TwlaError
from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint, folders, locks, places, resume

# In a process of its own: a run that puts `new` into OUT and is killed where `kill` says.
RUN = """
import os, pathlib, shutil, signal, sys
from twla_jax.storage import folders
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
out = pathlib.Path(sys.argv[1])
{kill}
with folders.beside(out) as temporary:
    (temporary / "model").write_text("new")
    {inside}
"""
BETWEEN_RENAMES = """
folders.exchange = lambda *_: False
rename = pathlib.Path.rename
pathlib.Path.rename = lambda path, to: die() if path.suffix == ".tmp" else rename(path, to)
"""


def killed_run(out: Path, kill: str = "", inside: str = "") -> None:
    code = RUN.format(kill=kill, inside=inside)
    assert subprocess.run([sys.executable, "-c", code, out]).returncode == -signal.SIGKILL


def write(out: Path, content: str) -> None:
    with folders.beside(out) as temporary:
        (temporary / "model").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path) -> Path:
    write(tmp_path / "out", "old")
    return tmp_path / "out"


@pytest.mark.parametrize("exchanges", [True, False])
def test_new_contents_take_the_place_of_old_ones(out, exchanges, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(folders, "exchange", lambda *_: False)
    write(out, "new")
    assert (out / "model").read_text() == "new"
    assert names(out.parent) == ["out"]


def test_a_run_killed_between_two_renames_is_named_by_readers_and_undone_by_the_next_run(out, capsys):
    killed_run(out, BETWEEN_RENAMES)
    assert not out.exists()
    assert (locks.replaced_folder(out) / "model").read_text() == "old"
    with locks.hold(out):
        assert (out / "model").read_text() == "old"
        assert names(out.parent) == [".out.lock", "out"]
    assert "was being replaced when an earlier run was killed" in capsys.readouterr().err
    assert names(out.parent) == ["out"]


def test_a_run_killed_after_the_exchange_leaves_the_new_contents(out):
    killed_run(out, "shutil.rmtree = die")
    assert (out / "model").read_text() == "new"
    write(out, "newer")
    assert (out / "model").read_text() == "newer"
    assert names(out.parent) == ["out"]


def test_a_run_killed_while_it_writes_leaves_the_old_contents(out):
    killed_run(out, inside="die()")
    assert (out / "model").read_text() == "old"
    write(out, "new")
    assert names(out.parent) == ["out"]


def test_hidden_folders_named_by_a_process_id_do_not_block(out):
    for suffix in ("old", "tmp"):
        (out.parent / f".out.1.{suffix}").mkdir()
        (out.parent / f".out.1.{suffix}" / "model").write_text("left")
    write(out, "new")
    assert names(out.parent) == ["out"]


def test_a_kill_while_finished_parts_are_removed_leaves_none_that_another_run_would_take_up(out, monkeypatch):
    work = out.with_name("out.partial")
    resume.WorkDir(work, "mine").save("block-0", {})

    def killed(folder, **_):
        (Path(folder) / "fingerprint.json").unlink()
        raise KeyboardInterrupt

    with locks.hold(out), monkeypatch.context() as patched:
        patched.setattr(folders.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            folders.discard_work(work, out)
    with locks.hold(out):
        assert resume.WorkDir(work, "mine").names("block-0") is None
        folders.discard_work(work, out)
    assert names(out.parent) == ["out"]


def test_other_folders_beside_it_stay(out):
    others = [".out.notes.tmp", ".outer.1.tmp", ".out.1.tmp.tar", "out.partial"]
    for name in others:
        (out.parent / name).mkdir()
    write(out, "new")
    assert names(out.parent) == sorted([*others, "out"])


def test_what_threads_of_a_failed_save_go_on_writing_is_removed(out):
    def fill(temporary):
        with contextlib.suppress(OSError):
            for index in range(200):
                (temporary / f"part-{index}").mkdir()
                time.sleep(0.001)

    def save():
        with folders.beside(out) as temporary:
            threading.Thread(target=fill, args=[temporary]).start()
            time.sleep(0.03)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TwlaError, match="no space left on device; nothing was written"):
        save()
    assert names(out.parent) == ["out"]


def test_nothing_was_written_is_said_only_when_it_is_so(out, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    sync = folders._sync
    monkeypatch.setattr(folders, "_sync", lambda path: fail() if path == out.parent else sync(path))
    with pytest.raises(TwlaError, match="Input/output error; the new contents are in place"):
        write(out, "new")
    assert (out / "model").read_text() == "new"
    monkeypatch.setattr(folders, "_sync", fail)
    with pytest.raises(TwlaError, match="Input/output error; nothing was written"):
        write(out, "newer")
    assert (out / "model").read_text() == "new"


def test_one_run_at_a_time_writes_a_folder_and_a_killed_one_keeps_nobody_out(out):
    code = RUN.format(kill="", inside="print(flush=True); sys.stdin.read()")
    with subprocess.Popen(
        [sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as run:
        run.stdout.readline()
        with pytest.raises(TwlaError, match="another run is writing it"):
            write(out, "mine")
        run.kill()
    write(out, "mine")
    assert (out / "model").read_text() == "mine"
    assert names(out.parent) == ["out"]


def test_of_threads_that_save_one_folder_each_saves_or_is_told(out):
    results, begin = [], threading.Barrier(4)

    def save(content):
        begin.wait()
        try:
            write(out, content)
            results.append(content)
        except TwlaError as error:
            results.append(str(error))

    threads = [threading.Thread(target=save, args=[str(index)]) for index in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    saved = {"0", "1", "2", "3"} & set(results)
    assert (out / "model").read_text() in saved
    assert all("another run is writing it" in each for each in set(results) - saved)
    assert len(results) == 4
    assert names(out.parent) == ["out"]


def test_parents_are_made_and_go_again_where_nothing_came_of_it(tmp_path):
    with pytest.raises(ZeroDivisionError), folders.beside(tmp_path / "a" / "b" / "out"):
        raise ZeroDivisionError
    assert names(tmp_path) == []
    write(tmp_path / "a" / "b" / "out", "new")
    assert (tmp_path / "a" / "b" / "out" / "model").read_text() == "new"


def test_a_link_is_followed(out, tmp_path):
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "dangling").symlink_to("models/later")
    write(places.resolve_place(tmp_path / "link"), "new")
    write(places.resolve_place(tmp_path / "dangling"), "later")
    assert (tmp_path / "link").is_symlink()
    assert (out / "model").read_text() == "new"
    assert (tmp_path / "models" / "later" / "model").read_text() == "later"


def test_home_is_spelled_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.resolve_place("~/x") == tmp_path / "x"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "empty name"),
        (" ", "empty name"),
        ("a\0b", "null byte"),
        (".", "current folder"),
        ("..", "current folder"),
        ("/", "current folder"),
        ("sub/..", "current folder"),
        ("~nobody-of-that-name/x", "no such home"),
        ("loop", "leads back to itself"),
        ("x" * 240, "longer than 200 bytes"),
        ("\udcff", "no text in this locale"),
    ],
)
def test_a_place_that_is_none_is_refused(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(TwlaError, match=message) as caught:
        places.resolve_place(place)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_mount_points_are_refused(tmp_path, monkeypatch):
    with pytest.raises(TwlaError, match="mount point"):
        places.require_replaceable(Path("/proc"))
    mounts = tmp_path / "mountinfo"
    folder = tmp_path / "of the same device"
    folder.mkdir()
    escaped = str(folder).replace(" ", "\\040")
    mounts.write_text(f"36 35 98:0 / {escaped} rw,noatime - ext3 /dev/root rw\n")
    monkeypatch.setattr(places, "_MOUNTS", mounts)
    with pytest.raises(TwlaError, match="mount point"):
        places.require_replaceable(folder)
    places.require_replaceable(tmp_path)


def test_a_disk_without_room_for_new_files_is_refused(tmp_path, monkeypatch):
    folders.require_room(tmp_path / "out", [1000])
    full = os.statvfs_result((4096, 4096, 10**6, 10**6, 10**6, 1000, 60, 60, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(TwlaError, match="no inodes left"):
        folders.require_room(tmp_path / "out", [1000] * 50)


def test_an_interrupt_waits_until_the_arrays_are_written(tiny_ternary, tmp_path, monkeypatch):
    # In the middle of it, orbax's threads would each print a traceback.
    save, ended = ocp.PyTreeCheckpointer.save, []

    def interrupted(*args):
        _thread.interrupt_main()
        save(*args)
        ended.append(True)

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tiny_ternary, None, tmp_path / "out", Recipe(), {})
    assert ended
    assert not list(tmp_path.iterdir())
