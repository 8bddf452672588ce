"""Keeps what JAX compiles for the command line in the user's cache folder, so that the next command starts sooner."""

import contextlib
import os
import warnings
from pathlib import Path

from twla_jax.errors import TwlaError

SETTING = "TWLA_COMPILATION_CACHE"
_JAX = "JAX_COMPILATION_CACHE_DIR"
_JAX_SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
_PROGRAM, _USED = "-cache", "-atime"  # endings of JAX's files
_MOST_BYTES = 2**30  # beyond, programs that were not used for longest are deleted
_LEAST_SECONDS = 0.1  # what compiles faster is not worth a file
_PATIENCE = 1.0  # seconds to wait for another run's lock


def keep_compiled_programs() -> Path | None:
    """Make JAX keep compiled programs between runs; return the folder, or None where this sets none.

    It works through JAX's own settings in the environment, hence only before JAX is imported. A folder that
    `JAX_COMPILATION_CACHE_DIR` names stays JAX's, and all its other settings keep what they are set to.

    Raises:
      TwlaError: `TWLA_COMPILATION_CACHE` names a folder that cannot be written. The default is given up silently.
    """
    wanted = os.environ.get(SETTING, "")
    if _JAX in os.environ or wanted.lower() == "off":
        return None
    folder = Path(os.path.abspath(os.path.expanduser(wanted))) if wanted else _default_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        if wanted:
            raise TwlaError(f"{SETTING}={wanted}: is no folder that can be written; 'off' keeps nothing")
        return None
    os.environ[_JAX] = str(folder)
    if os.environ.setdefault(_JAX_SIZE, str(_MOST_BYTES)) == str(_MOST_BYTES):
        _remove_unfinished(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_LEAST_SECONDS))
    # As on a full disk: the program is compiled and runs all the same.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    return folder


def _remove_unfinished(folder: Path) -> None:
    """Remove programs that a killed run or a full disk cut short: JAX could not read them, and never replaces them.

    JAX writes a program and then, in a file beside it, when it was used; so what lacks that file may not be whole.
    """

    def unfinished() -> list[Path]:
        names = set(os.listdir(folder))
        cut = (name for name in names if name.endswith(_PROGRAM))
        return [folder / name for name in cut if name.removesuffix(_PROGRAM) + _USED not in names]

    with contextlib.suppress(OSError):
        if unfinished():
            import filelock

            # JAX holds this lock while it writes.
            with filelock.FileLock(folder / ".lockfile", timeout=_PATIENCE):
                for path in unfinished():
                    path.unlink(missing_ok=True)


def _default_folder() -> Path:
    """Return the folder in the user's cache, where the XDG base directory specification puts it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~"), ".cache")
    return cache / "twla_jax" / "compiled"
