"""Tasks of lm-evaluation-harness: with the extra `eval`, its own prompts and counts; without, one line that says so."""

import json
import sys

import pytest

from twla_jax.errors import TwlaError
from twla_jax.evaluation import tasks
from twla_jax.evaluation.harness import HarnessModel
from twla_jax.jobs import loading


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    for name in ("lm_eval", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TwlaError, match=r"pip install 'twla-jax\[eval\]'"):
        tasks.evaluate_tasks(None, ["piqa"])
    with pytest.raises(TwlaError, match="known are arc_easy, boolq, hellaswag, piqa"):
        tasks.evaluate_tasks(None, [])


def test_the_table_shows_what_was_lost():
    row = {"name": "piqa", "documents": 8, "metric": "acc_norm", "score": 50.0, "score_stderr": 18.9}
    lost = {"original_score": 62.5, "lost": 12.5}
    lines = tasks.format_tasks({"tasks": [row | lost], "score": 50.0, **lost}).splitlines()
    assert [line.split() for line in lines] == [
        ["task", "documents", "metric", "score", "±", "original", "lost"],
        ["piqa", "8", "acc_norm", "50.00", "18.90", "62.50", "12.50"],
        ["average", "50.00", "62.50", "12.50"],
    ]
    assert "lost" not in tasks.format_tasks({"tasks": [row], "score": 50.0})


def test_a_group_with_a_score_stands_for_its_tasks():
    found = {
        "results": {
            "mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 3},
            "mmlu_stem": {"alias": "stem", "acc,none": 0.25, "acc_stderr,none": "N/A"},
            "anatomy": {"acc,none": 1.0, "acc_stderr,none": 0.0},
            "physics": {"acc,none": 0.25, "acc_stderr,none": 0.2},
            "both": {"alias": "both"},
            "piqa": {"acc,none": 0.6, "acc_stderr,none": 0.1},
        },
        "group_subtasks": {"mmlu": ["mmlu_stem", "anatomy"], "mmlu_stem": ["physics"], "both": ["piqa"]},
        "n-samples": {name: {"effective": n} for name, n in (("anatomy", 1), ("physics", 2), ("piqa", 4))},
    }
    rows = tasks.rows_of(found, ["mmlu", "both"])
    assert [(row["name"], row["documents"], row["score"]) for row in rows] == [
        ("mmlu", 3, 50),
        ("piqa", 4, 60),
    ]
    rows = tasks.rows_of(found, ["mmlu", "physics"])
    assert [row["name"] for row in rows] == ["mmlu", "physics", "piqa"]


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="needs the extra eval")


def test_prompts_are_those_of_the_harness(harness, data):
    from lm_eval.tasks.hellaswag.utils import preprocess

    loaded = tasks._load(tasks.task_names())["tasks"]
    for doc in loaded["hellaswag"].validation_docs():
        context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
        assert loaded["hellaswag"].doc_to_text(doc) == preprocess(context)
        assert loaded["hellaswag"].doc_to_choice(doc) == [preprocess(ending) for ending in doc["endings"]]
        assert loaded["hellaswag"].doc_to_target(doc) == doc["label"]
    (question, *_) = loaded["arc_easy"].test_docs()
    assert loaded["arc_easy"].doc_to_text(question) == f"Question: {question['question']}\nAnswer:"
    (goal, *_) = loaded["piqa"].validation_docs()
    assert loaded["piqa"].doc_to_text(goal) == f"{goal['query'].strip()}\nAnswer:"
    (passage, *_) = loaded["boolq"].validation_docs()
    assert passage["query"] == "Passage: " + loaded["boolq"].doc_to_text(passage).removesuffix("\nAnswer:")


def test_scores_are_the_shares_of_likeliest_choices(harness, data, stories_model):
    model, tokenizer = loading.load(stories_model)
    lm = HarnessModel(model, tokenizer, progress=False)
    result = tasks.evaluate_tasks(lm, ["piqa"], original=lm, limit=12)
    (row,) = result["tasks"]
    docs = [json.loads(line) for line in (data / "zeroshot" / "piqa.jsonl").read_text().splitlines()[:12]]
    right = 0
    for doc in docs:
        asked = [(f"{doc['query']}Answer:", f" {choice}") for choice in doc["choices"]]
        logs = [lm.loglikelihood([type("R", (), {"args": each})])[0][0] for each in asked]
        right += logs.index(max(logs)) == doc["gold"]
    assert row["documents"] == 12
    assert row["acc"] == pytest.approx(right / 12)
    assert row["metric"] == "acc_norm"
    assert result["score"] == row["score"] == pytest.approx(100 * row["acc_norm"])
    assert result["lost"] == 0
    with pytest.raises(TwlaError, match="no_such_task"):
        tasks.evaluate_tasks(lm, ["no_such_task"])
