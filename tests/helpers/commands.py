"""Runs commands in this process, and reads the one line of those that must fail."""

import pytest

from twla_jax.cli import main


def run(capsys, *arguments):
    main.main(list(map(str, arguments)))
    return capsys.readouterr()


def fails(capsys, *arguments):
    """The one line of a command that must fail, and its exit status."""
    with pytest.raises(SystemExit) as stop:
        main.main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("twla: error: ")]
    assert len(lines) == 1
    assert lines[0] == printed.err.splitlines()[-1]
    assert "Traceback" not in printed.err
    return lines[0], stop.value.code
