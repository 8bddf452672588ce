"""The command line keeps compiled programs in the user's cache; one setting moves them or turns that off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twla_jax.compilation_cache import keep_compiled_programs
from twla_jax.errors import TwlaError

JAX = "JAX_COMPILATION_CACHE_DIR"
NAMES = (
    "TWLA_COMPILATION_CACHE",
    JAX,
    "JAX_COMPILATION_CACHE_MAX_SIZE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user without settings of their own; what is set meanwhile is forgotten."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the call sets
        monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_it_is_in_the_users_cache(home, tmp_path, monkeypatch):
    assert keep_compiled_programs() == home / ".cache" / "twla_jax" / "compiled"
    assert os.environ[JAX] == str(home / ".cache" / "twla_jax" / "compiled")
    assert home.joinpath(".cache", "twla_jax", "compiled").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv(JAX)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert keep_compiled_programs() == tmp_path / "cache" / "twla_jax" / "compiled"


def test_a_setting_moves_it_or_turns_it_off(home, tmp_path, monkeypatch):
    monkeypatch.setenv("TWLA_COMPILATION_CACHE", "off")
    assert keep_compiled_programs() is None
    assert JAX not in os.environ
    monkeypatch.setenv("TWLA_COMPILATION_CACHE", "~/elsewhere")
    assert keep_compiled_programs() == home / "elsewhere"
    assert not home.joinpath(".cache").exists()


def test_what_is_set_for_jax_stays(home, monkeypatch):
    monkeypatch.setenv(JAX, "/somewhere")
    assert keep_compiled_programs() is None
    assert os.environ[JAX] == "/somewhere"
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ
    assert not home.exists()


def test_a_folder_that_cannot_be_written_is_refused_only_if_it_was_asked_for(home, monkeypatch):
    home.write_text("a file")
    assert keep_compiled_programs() is None
    assert JAX not in os.environ
    monkeypatch.setenv("TWLA_COMPILATION_CACHE", str(home / "folder"))
    with pytest.raises(TwlaError, match=r"TWLA_COMPILATION_CACHE=.*folder that can be written"):
        keep_compiled_programs()


def test_programs_that_were_cut_short_are_removed(tmp_path, monkeypatch):
    """JAX could not read them, and would compile them at every start as it replaces none."""
    monkeypatch.setenv("TWLA_COMPILATION_CACHE", str(tmp_path))
    for name in ("whole-cache", "whole-atime", "cut-cache"):
        (tmp_path / name).write_bytes(b"12345678")
    keep_compiled_programs()
    assert {path.name for path in tmp_path.iterdir()} - {".lockfile"} == {"whole-cache", "whole-atime"}
    # Without a bound, JAX does not note when a program was used.
    (tmp_path / "whole-atime").unlink()
    monkeypatch.delenv(JAX)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    keep_compiled_programs()
    assert (tmp_path / "whole-cache").exists()


PROGRAM = """
import sys
from twla_jax.cli import main
def compiles(model: str, /):
    import jax, jax.numpy as jnp
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    print(jax.jit(lambda x: x + 1)(jnp.ones(3)))
    print(jax.config.jax_compilation_cache_max_size)
main.COMMANDS["inspect"] = compiles
main.main(["inspect", "model"])
"""


def test_a_command_leaves_its_programs_there_and_the_library_none(home):
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}

    def run(program):
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
        ).stdout.split("\n")

    library = "import twla_jax, jax, os; twla_jax.load; print(jax.config.jax_compilation_cache_dir)"
    assert run(library)[0] == "None"
    assert not home.exists()
    assert run(PROGRAM)[:2] == ["[2. 2. 2.]", str(2**30)]
    assert list(home.glob(".cache/twla_jax/compiled/*-cache"))
