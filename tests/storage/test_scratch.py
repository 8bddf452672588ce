"""A temporary folder is its process's own, and goes with it, or at the next start."""

import os
import subprocess
import sys
import tempfile

from twla_jax.storage.scratch import temporary_folder

# Takes a folder, says so, and waits for what comes.
HOLDER = """
import sys
from twla_jax.storage.scratch import temporary_folder
with temporary_folder() as folder:
    (folder / "part").write_text("packed")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_and_what_lives_stays(tmp_path, monkeypatch):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    killed, living = (tmp_path / holder.stdout.readline().strip() for holder in holders)
    holders[0].kill()
    holders[0].communicate()
    (tmp_path / "twla-notes").mkdir()  # of somebody else
    assert (killed / "part").exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as own:
        assert not killed.exists()
        assert (living / "part").exists()
        assert own.stat().st_mode & 0o777 == 0o700
    holders[1].communicate(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["twla-notes"]
