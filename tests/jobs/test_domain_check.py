"""A refined model is kept where its worst domain is no worse than before."""

import math
import types

import numpy as np
import pytest

from twla_jax.jobs import domain_check
from twla_jax.text.recipe_windows import DrawnText


def drawn(windows, domains):
    rows = np.arange(windows)[:, None] * np.ones((1, 4), np.int32)
    return DrawnText(
        calibration=rows, refinement=rows, held_out=None, overlap=0.0, description={}, domains=domains
    )


def test_windows_come_from_the_domains_in_turn():
    found = domain_check.domain_windows(drawn(8, ("a", "b", "c")))
    assert {name: rows[:, 0].tolist() for name, rows in found.items()} == {
        "a": [0, 3],
        "b": [1, 4],
        "c": [2, 5],
    }
    # A domain that has no window is left out.
    assert domain_check.domain_windows(drawn(2, ("a", "b", "c"))).keys() == {"a", "b"}
    assert domain_check.domain_windows(drawn(8, ())) == {}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (2.0, 1.9, True),
        (2.0, 2.0, True),
        (2.0, 2.1, False),
        (2.0, math.nan, False),
        (math.nan, 9.0, True),
        (math.nan, math.nan, False),
    ],
)
def test_the_worst_domain_decides(before, after, kept, monkeypatch, caplog):
    ratios = {"before": [("mean", 1.1), ("worst", before)], "after": [("other", 1.0), ("lost", after)]}

    def evaluate_domains(model, texts, *, original, mesh, progress):
        assert (original.name, mesh) == ("teacher", "mesh")
        return {"domains": [{"name": name, "ratio": ratio} for name, ratio in ratios[model.name]]}

    monkeypatch.setattr(domain_check, "evaluate_domains", evaluate_domains)
    monkeypatch.setattr(domain_check, "computing_in", lambda model, dtype, fused: model)
    models = [types.SimpleNamespace(name=name) for name in ("before", "after", "teacher")]
    chosen, figures = domain_check.better_by_domain(*models, {}, "float32", mesh="mesh", progress=False)
    assert chosen is models[kept]
    assert figures["before"]["worst"] == "worst"
    assert figures["after"]["worst"] == "lost"
    assert ("left as it was" in caplog.text) != kept
