"""Shows how far a long computation is, on stderr, unless the process is told to be quiet."""

import os
import sys
from typing import Any

from tqdm import tqdm

SETTING = "TWLA_QUIET"


def is_quiet() -> bool:
    """Return whether only figures, warnings and errors are to be shown, as the variable `TWLA_QUIET` asks."""
    return bool(os.environ.get(SETTING))


def say(message: str) -> None:
    """Print what is going on, in one line on stderr; in a quiet process, nothing."""
    if not is_quiet():
        print(f"twla: {message}", file=sys.stderr, flush=True)


class Bar(tqdm):
    """Draws a bar of tqdm's, which stays away from a quiet process."""

    def __init__(self, *args: Any, disable: bool = False, **kwargs: Any):
        super().__init__(*args, disable=disable or is_quiet(), **kwargs)
