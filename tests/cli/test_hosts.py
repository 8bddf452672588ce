"""Several processes, as on several hosts, score and quantise a model together."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from twla_jax import hosts
from twla_jax.errors import TwlaError
from twla_jax.models import sharding

from helpers.quick_recipe import QUICK

# A command in a process of its own, which is killed before it opens a file of this name to write.
CHILD = """
import os, signal, sys
deadly = sys.argv[1]

def hear(event, arguments):
    if deadly and event == "open" and deadly in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hear)
from twla_jax.cli import main
main.main(sys.argv[2:])
"""
CHILD_DEVICES = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def together(command, mesh, *, devices, deadly=("", ""), **more):
    """Exit status, stdout and stderr of two processes that run a command together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                CHILD,
                word,
                *command,
                "--mesh",
                mesh,
                "--coordinator",
                f"{address},2,{index}",
            ],
            env=os.environ | CHILD_DEVICES | {"JAX_NUM_CPU_DEVICES": str(devices)} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, word in enumerate(deadly)
    ]
    printed = [process.communicate(timeout=300) for process in both]
    return [(process.returncode, *texts) for process, texts in zip(both, printed, strict=True)]


def alone(command, *, devices):
    """What one process prints on stdout."""
    environment = os.environ | CHILD_DEVICES | {"JAX_NUM_CPU_DEVICES": str(devices)}
    child = [sys.executable, "-m", "twla_jax", *command]
    return subprocess.run(child, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_two_processes_score_what_one_does(stories_model, texts):
    command = ["eval", str(stories_model), "--corpus", str(texts / "evaluation.txt")]
    command += ["--seq-len", "64", "--max-windows", "3", "--json"]
    (status, answer, _), (other, nothing, progress) = together(command, "data=2,model=2", devices=2)
    assert (status, other) == (0, 0), (answer, progress)
    # Gloo, through which CPUs talk, writes about its connections itself, from several threads at a time.
    assert "{" not in nothing
    assert "evaluate" not in progress
    one = json.loads(alone(command, devices=1))
    two = json.JSONDecoder().raw_decode(answer[answer.index("{") :])[0]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
    assert two["windows"] == one["windows"] == 3


def contents(folder):
    """SHA-256 of every file by name, but for the report, which holds seconds, and the manifest, its checksum."""
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("report.json", "twla.json")
    )
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_two_processes_quantise_to_the_bytes_of_one_and_go_on_when_one_was_killed(
    stories_model, texts, tmp_path
):
    (tmp_path / "quick.toml").write_text(QUICK)
    text = str(texts / "calibration.txt")
    command = ["--recipe", str(tmp_path / "quick.toml"), "--calibration", text, "--check-corpus", text]
    command += ["--windows", "4", "--seq-len", "64", "--check-windows", "2"]
    many, one = (["quantize", str(stories_model), str(tmp_path / out), *command] for out in ("many", "one"))
    (tmp_path / "temporary").mkdir()
    options = {"devices": 1, "TMPDIR": str(tmp_path / "temporary")}
    options |= {"TWLA_COMPILATION_CACHE": str(tmp_path / "programs")}
    (status, _, message), (killed, _, _) = together(many, "data=2", deadly=("", "block-2.npz"), **options)
    assert killed == -signal.SIGKILL
    assert status == 1
    assert [line for line in message.splitlines() if "another host has stopped" in line], message
    assert not (tmp_path / "many").exists()
    assert (tmp_path / "many.partial" / "block-0.npz").exists()
    # What is finished is not done, and not written, again.
    (status, printed, message), (other, nothing, progress) = together(
        many, "data=2", deadly=("many.partial/.block-0.npz", ""), **options
    )
    assert (status, other) == (0, 0), (message, progress)
    assert "perplexity on" in printed
    assert "perplexity on" not in nothing
    assert "blocks" not in progress
    alone([*one, "--mesh", "data=2"], devices=2)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert not (tmp_path / "many.partial").exists()


# One step of each kind of training, and an allocation by whole blocks.
EVERY_STAGE = """
[refine.blocks]
steps = 2
batch = 2
[refine.end_to_end]
steps = 2
batch = 2
[refine.clips]
bits = 4
steps = 2
batch = 2
[allocation]
budget = 6.0
site = "block"
windows = 2
seq_len = 64
"""


def sensitivities(folder):
    """What was measured for the allocation, but for its seconds."""
    found = json.loads((folder / "ila_amp.json").read_text())
    for entry in found["tables"].values():
        del entry["table"]["effort"]["seconds"]
    return found


@pytest.mark.slow
def test_two_processes_refine_and_allocate_to_the_bytes_of_one(stories_model, texts, tmp_path):
    """On text of the model's own; the first run ends before clips are kept, and the second goes on from there."""
    (tmp_path / "every.toml").write_text(QUICK + EVERY_STAGE)
    command = ["--recipe", str(tmp_path / "every.toml"), "--calibration", "self"]
    command += ["--check-corpus", str(texts / "calibration.txt")]
    command += ["--windows", "4", "--seq-len", "64", "--check-windows", "2"]
    many, one = (["quantize", str(stories_model), str(tmp_path / out), *command] for out in ("many", "one"))
    options = {"devices": 1, "TWLA_COMPILATION_CACHE": str(tmp_path / "programs")}
    (killed, _, _), (status, _, _) = together(
        many, "data=2", deadly=("many.partial/clips/.state", ""), **options
    )
    assert killed == -signal.SIGKILL
    assert status not in (0, killed)
    assert (tmp_path / "many.partial" / "refine" / "state.npz").exists()
    (status, printed, message), (other, _, progress) = together(many, "data=2", **options)
    assert (status, other) == (0, 0), (message, progress)
    assert "activation bits" in printed
    alone([*one, "--mesh", "data=2"], devices=2)
    both = [contents(tmp_path / name) for name in ("many", "one")]
    for found in both:
        del found["ila_amp.json"]  # which holds seconds, too
    assert both[0] == both[1]
    assert sensitivities(tmp_path / "many") == sensitivities(tmp_path / "one")


def test_parts_of_an_array_come_back_as_they_were():
    """As streams of several hosts lie on each: the parts of its own devices."""
    mesh = sharding.make_mesh("data=4,model=2")
    array = sharding.place_batch(np.arange(24.0).reshape(8, 3), mesh)
    parts = hosts.Parts.of(array)
    assert (
        sorted(part.shape for part in parts.by_place.values()) == [(2, 3)] * 4
    )  # over `model` they are the same
    back = parts.on_devices()
    np.testing.assert_array_equal(back, array)
    assert back.sharding == array.sharding


def test_one_host_is_the_first_and_does_everything_itself():
    assert hosts.is_first()
    assert hosts.from_first(lambda: "found") == "found"
    hosts.require_same("00", "model")
    array = jax.device_put(np.ones(8), sharding.batch_sharding(sharding.make_mesh("data=8")))
    np.testing.assert_array_equal(hosts.fetch({"x": array})["x"], np.ones(8))


@pytest.mark.parametrize("text", ["nowhere", "host,2,0", "host:1,2", "host:1,2,2", "host:1,a,0"])
def test_a_coordinator_that_cannot_be_is_refused(text):
    with pytest.raises(TwlaError, match="--coordinator"):
        hosts.join(text)
