"""Several processes, as on several hosts, score a model together."""

import json
import os
import socket
import subprocess
import sys

import pytest

from twla_jax import devices
from twla_jax.errors import TwlaError


@pytest.mark.slow
def test_two_processes_score_what_one_does(stories_model, texts):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "twla_jax", "eval", str(stories_model)]
    command += ["--corpus", str(texts / "evaluation.txt"), "--seq-len", "64", "--max-windows", "3", "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    both = [
        subprocess.Popen(
            [*command, "--mesh", "data=2,model=2", "--coordinator", f"{address},2,{index}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    printed = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    # Gloo, through which CPUs talk, writes about its connections itself, from several threads at a time.
    (answer, _), (nothing, _) = printed
    assert "{" not in nothing
    assert "evaluate" not in printed[1][1]
    alone = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    one, two = json.loads(alone.stdout), json.JSONDecoder().raw_decode(answer[answer.index("{") :])[0]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
    assert two["windows"] == one["windows"] == 3


@pytest.mark.parametrize("text", ["nowhere", "host,2,0", "host:1,2", "host:1,2,2", "host:1,a,0"])
def test_a_coordinator_that_cannot_be_is_refused(text):
    with pytest.raises(TwlaError, match="--coordinator"):
        devices.join_hosts(text)
