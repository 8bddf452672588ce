"""Keeps what scripts share that try one thing after another: results as they come, and mistakes in one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twla_jax import xla_flags
from twla_jax.errors import TwlaError


def keep(found: dict[str, Any], line: str, path: Path | None) -> None:
    """Print the line of a result, and add the result to a file of JSON lines, if there is one."""
    print(line, flush=True)
    if path:
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")


def print_table(name: str, make: Callable[[], str]) -> None:
    """Print the table that a script makes; a user's mistake ends it with one line."""
    xla_flags.disable_triton_gemm()
    try:
        print(make())
    except TwlaError as error:
        sys.exit(f"{name}: error: {error}")
