"""Every command explains itself, shells complete it, and help comes at once."""

import os
import subprocess
import sys

import pytest

from twla_jax.cli import main

from helpers.commands import fails, run


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([command, "--help"])
    assert not stop.value.code
    assert f"usage: twla {command}" in capsys.readouterr().out
    assert f"\n  {command} " in run(capsys, "--help").out


def test_shells_complete_commands_and_options(tmp_path, capsys):
    script = tmp_path / "twla"
    with pytest.raises(SystemExit) as stop:
        main.main(["--completion", "bash"])
    assert not stop.value.code
    script.write_text(capsys.readouterr().out)
    typed = 'COMP_WORDS=(twla inspect --v); COMP_CWORD=2; _tyro_twla; echo "${COMPREPLY[@]}"'
    completed = subprocess.run(["bash", "-c", f"source {script}; {typed}"], capture_output=True, check=True)
    assert completed.stdout.decode().split() == ["--verify"]
    assert fails(capsys, "--completion", "perl")[1] == 2


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_are_for_terminals_that_want_them(no_color):
    code = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', 'twla_jax', 'inspect', '--help']))"
    variables = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    said = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, check=True).stdout
    assert b"usage: twla inspect" in said.replace(b"\x1b[m", b"").replace(b"\x1b[0m", b"").replace(
        b"\x1b[1m", b""
    )
    assert (b"\x1b[" in said) == (not no_color)


@pytest.mark.smoke
def test_help_imports_nothing_heavy():
    code = "import sys, twla_jax.cli.main; assert not {'jax', 'flax', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
