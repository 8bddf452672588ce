"""The GPU's checks, on what runs here: the reference passes against itself, and a wrong kernel does not."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from twla_jax.benchmark import SHAPES, shapes
from twla_jax.ops.ternary_matmul import reference


def load(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_check_tells_right_from_wrong(monkeypatch):
    script = load("check_gpu")
    script.check("xla")
    from twla_jax.ops.ternary_matmul import tpu

    monkeypatch.setattr(
        tpu, "matmul", lambda *args, **settings: reference.matmul(*args, **settings).at[0, 0].add(1)
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        script.check("tpu")


def test_perplexities_by_path_agree_where_there_are_no_kernels():
    script = load("check_perplexity")
    model = shapes.random_model(SHAPES["tiny"], activation_bits=8)
    tokens = np.random.default_rng(0).integers(0, 256, 64)
    found = script.compare(model, tokens, 8, seq_len=32)
    assert found[script.KERNELS] == found[script.REFERENCE]
    assert found[script.OWN] == pytest.approx(found[script.REFERENCE], rel=0.02)
    assert script.difference({script.KERNELS: 1.01, script.REFERENCE: 1.0}) == pytest.approx(0.01)
