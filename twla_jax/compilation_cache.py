"""Keeps what JAX compiles for the command line in the user's cache folder, so that the next command starts sooner."""

import os
import warnings
from pathlib import Path

from twla_jax.errors import TwlaError

SETTING = "TWLA_COMPILATION_CACHE"
_JAX = "JAX_COMPILATION_CACHE_DIR"
_MOST_BYTES = 2**30  # beyond, programs that were not used for longest are deleted
_LEAST_SECONDS = 0.1  # what compiles faster is not worth a file


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
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MOST_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_LEAST_SECONDS))
    # As on a full disk: the program is compiled and runs all the same.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    return folder


def _default_folder() -> Path:
    """Return the folder in the user's cache, where the XDG base directory specification puts it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~"), ".cache")
    return cache / "twla_jax" / "compiled"
