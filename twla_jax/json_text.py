"""Writes JSON that every reader of JSON takes: without NaN and infinities, which the standard does not know."""

import json
import math
from typing import Any

from twla_jax.errors import TwlaError


def dumps(value: Any, *, indent: int | None = 1) -> str:
    """Return JSON text with a line end; numbers that are not finite become null.

    Raises:
      TwlaError: the value holds something that JSON has no form for.
    """
    try:
        return json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TwlaError(f"not to be written as JSON: {error}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
