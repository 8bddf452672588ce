"""Gives language models in JAX ternary weights and low-bit activations."""

import ast
import importlib
from pathlib import Path
from typing import Any

from twla_jax.version import __version__ as __version__


def _homes() -> dict[str, str]:
    """Return the module that each public name lives in, as the stub beside this file says."""
    tree = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_HOMES = _homes()
_MODULES = {name for name, home in _HOMES.items() if home == __name__}

__all__ = sorted(set(_HOMES) - _MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `import twla_jax` and `twla --help` are quick.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
