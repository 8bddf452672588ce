"""The GPU's check, on what runs here: the reference passes against itself, and a wrong kernel does not."""

import importlib.util
from pathlib import Path

import pytest

from twla_jax.ops.ternary_matmul import reference


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "benchmarks" / "check_gpu.py"
    spec = importlib.util.spec_from_file_location("check_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_check_tells_right_from_wrong(script, monkeypatch):
    script.check("xla")
    from twla_jax.ops.ternary_matmul import tpu

    monkeypatch.setattr(
        tpu, "matmul", lambda *args, **settings: reference.matmul(*args, **settings).at[0, 0].add(1)
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        script.check("tpu")
