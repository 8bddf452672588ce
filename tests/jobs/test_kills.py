"""Runs that are killed where they write: the place is as before or whole, and the next run ends as if nothing was."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

from twla_jax.recipe import Recipe
from twla_jax.storage import checkpoint

from helpers.chat_tokenizer import chat_tokenizer

# A command in a process of its own, killed before it changes the file system for the so-many-th time.
CHILD = """
import os, signal, sys
place, last, changes = sys.argv[1], int(sys.argv[2]), 0
written = os.O_WRONLY | os.O_RDWR | os.O_CREAT
names = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime"}

def hear(event, arguments):
    global changes
    opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & written
    if (opens or event in names) and place in str(arguments[:2]):
        if changes == last:
            os.kill(os.getpid(), signal.SIGKILL)
        changes += 1

sys.addaudithook(hear)
from twla_jax.cli import main
main.main(sys.argv[3:])
print(changes)
"""
MOMENTS = 2  # of each command, the same ones every time; more by TWLA_KILLS
RECIPE = """
[weights]
group_size = 16
[weights.ternary]
rounds = 0
[rotation]
steps = 2
[activations]
clip_tokens = 64
[calibration]
windows = 4
seq_len = 16
[refine.end_to_end]
steps = 2
batch = 2
dtype = "float32"
"""


def run(place, last, *command):
    """The number of changes of a run that ends; None of one that was killed."""
    child = [sys.executable, "-c", CHILD, place, str(last), *map(str, command)]
    done = subprocess.run(child, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def contents(folder, leave_out=()):
    """SHA-256 of every file, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in leave_out)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def moments(changes, seed):
    count = int(os.environ.get("TWLA_KILLS", MOMENTS))
    return random.Random(seed).sample(range(changes), min(count, changes))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hf", "gguf"])  # a folder and a file
def test_a_killed_export_leaves_nothing_in_its_place(tiny_ternary, tmp_path, format):
    tokenizer = None if format == "gguf" else chat_tokenizer()
    checkpoint.save(tiny_ternary, tokenizer, tmp_path / "out", Recipe(), {})
    (tmp_path / "to").mkdir()
    command = ("export", tmp_path / "out", tmp_path / "to" / "dest", "--format", format)
    changes = run(tmp_path / "to", -1, *command)
    whole = contents(tmp_path / "to")
    for last in moments(changes, format):
        for path in (tmp_path / "to").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run(tmp_path / "to", last, *command) is None
        if (tmp_path / "to" / "dest").exists():  # killed once it was there
            assert contents(tmp_path / "to").items() >= whole.items()
        else:
            run(tmp_path / "to", -1, *command)
            assert contents(tmp_path / "to") == whole


@pytest.mark.slow
@pytest.mark.skipif("TWLA_KILLS" not in os.environ, reason="takes minutes: TWLA_KILLS says how many moments")
def test_a_killed_quantisation_leaves_the_old_model_and_goes_on_to_the_same_bytes(
    stories_model, texts, tmp_path
):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "to").mkdir()
    out = tmp_path / "to" / "out"
    command = ("quantize", stories_model, out, "--calibration", texts / "calibration.txt", "--overwrite")
    command += ("--recipe", tmp_path / "tiny.toml", "--check-windows", 1)
    run(tmp_path / "to", -1, *command, "--seed", 1)
    old = contents(out)
    shutil.copytree(out, tmp_path / "old")
    changes = run(tmp_path / "to", -1, *command)
    new = contents(out, leave_out=("report.json", "twla.json"))  # which hold seconds, and a checksum of these
    for last in moments(changes, 0):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)
        assert run(tmp_path / "to", last, *command) is None
        checkpoint.verify(out, checkpoint.read_manifest(out))
        found = contents(out, leave_out=("report.json", "twla.json"))
        assert found in (new, {name: value for name, value in old.items() if name in found})
        run(tmp_path / "to", -1, *command)
        assert contents(out, leave_out=("report.json", "twla.json")) == new
        assert [path.name for path in (tmp_path / "to").iterdir()] == ["out"]
