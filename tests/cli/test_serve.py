"""`twla serve`: what it says, what it refuses before any work, and how a signal ends it."""

import contextlib
import http.client
import importlib.util
import json
import re
import signal
import subprocess
import sys

import pytest

from twla_jax.cli import main
from twla_jax.cli.serve import KEY, key_of
from twla_jax.serving.server import listen


def fails(capsys, *arguments):
    with pytest.raises(SystemExit):
        main.main(["serve", "smollm2", *map(str, arguments)])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_served_is_refused_before_any_work(capsys, tmp_path, monkeypatch):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: cannot listen there (Address already in use" in fails(
            capsys, "--port", port
        )
    assert "cannot listen there" in fails(capsys, "--host", "no.such.host.invalid")
    assert "'65536' is not a whole number from 0 to 65535" in fails(capsys, "--port", 65536)
    (tmp_path / "key").write_text("two\nlines\n")
    assert "must hold one key" in fails(capsys, "--api-key-file", tmp_path / "key")
    for key in (" ", "two\nlines"):
        monkeypatch.setenv(KEY, key)
        assert f"{KEY}: must hold one key" in fails(capsys)
    monkeypatch.delenv(KEY)
    assert "--mesh data=2: requests are not split over devices" in fails(capsys, "--mesh", "data=2")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert fails(capsys).endswith("pip install 'twla-jax[serve]'")


def test_blanks_around_a_key_are_no_part_of_it(monkeypatch, tmp_path):
    """No client could send them: every request would be refused."""
    (tmp_path / "key").write_text("open sesame\n")
    monkeypatch.setenv(KEY, " open sesame\r\n")
    assert key_of(None) == key_of(str(tmp_path / "key")) == "open sesame"
    monkeypatch.setenv(KEY, "")
    assert key_of(None) is None


@pytest.mark.slow
@pytest.mark.parametrize(("number", "grace"), [(signal.SIGTERM, 60), (signal.SIGINT, 0)])
def test_a_signal_in_the_middle_of_a_stream(stories_model, number, grace):
    """With time, the stream goes on to its end; without, it ends with an error, not in silence."""
    command = [sys.executable, "-m", "twla_jax", "serve", stories_model, "--port", "0", "--slots", "2"]
    command += ["--max-length", "512", "--steps", "1", "--grace", str(grace)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        port = next(
            int(found[1]) for line in process.stderr if (found := re.search(r"127.0.0.1:(\d+)/v1", line))
        )
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {
            "model": stories_model.name,
            "prompt": "Once",
            "max_tokens": 500,
            "stream": True,
            "ignore_eos": True,
        }
        body["stream_options"] = {"include_usage": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        with contextlib.closing(connection), connection.getresponse() as response:
            response.readline()
            process.send_signal(number)
            events = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
        if grace:
            assert events[-1]["usage"]["completion_tokens"] == 500
        else:
            assert "shutting down" in events[-1]["error"]["message"]
        process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
