"""Runs tasks of lm-evaluation-harness, on a model and on the model it was made from."""

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.evaluation.harness import HarnessModel
from twla_jax.recipe import configs_folder

_FOLDER = "zeroshot"  # inside TWLA_DATA
_METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task has is the one that is compared


def task_names() -> list[str]:
    """Return the names of the tasks that are read from files in the folder `TWLA_DATA`."""
    return sorted(path.stem for path in (configs_folder() / "tasks").glob("*.yaml"))


def evaluate_tasks(
    model: HarnessModel,
    names: Sequence[str],
    *,
    original: HarnessModel | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return the scores of a model on tasks, and with an `original` the points that it lost.

    Args:
      model: what answers.
      names: of tasks. Those of `task_names` are read from the folder `TWLA_DATA/zeroshot` where their file is there;
        all others, or a YAML file, are left to the harness, which may fetch their data.
      original: the model to compare with.
      limit: of each task, take only the first so many documents.
    Returns:
      `tasks`, a row a task: `name`, `documents`, the task's metrics with their standard errors (`acc`, `acc_stderr`,
      …), `metric` (the name of the one that is compared: acc_norm where there is one), `score` and `score_stderr` in
      percent; with an original also `original_score` and `lost`, its points above the model's. `score`: the mean over
      tasks; `original_score` and `lost` likewise.
    Raises:
      TwlaError: the harness is not installed, or a task is not known or cannot be read.
    """
    if not names:
        raise TwlaError(f"there is no task to evaluate on; known are {', '.join(task_names())}")
    with _quiet():
        tasks = _load(names)
        rows = _rows(model, tasks, names, limit)
        if original is not None:
            for row, theirs in zip(rows, _rows(original, _load(names), names, limit), strict=True):
                row |= {"original_score": theirs["score"], "lost": theirs["score"] - row["score"]}
    means = {
        key: sum(row[key] for row in rows) / len(rows)
        for key in ("score", "original_score", "lost")
        if key in rows[0]
    }
    return {"tasks": rows, **means}


def format_tasks(result: Mapping[str, Any]) -> str:
    """Return the figures of `evaluate_tasks` as a table for a person, the mean over tasks last."""
    rows = result["tasks"]
    width = max(len("average"), *(len(row["name"]) for row in rows))
    compared = "lost" in result
    head = f"{'task':{width}}{'documents':>11}{'metric':>13}{'score':>8}{'±':>6}"
    lines = [head + (f"{'original':>10}{'lost':>7}" if compared else "")]
    for row in rows:
        line = f"{row['name']:{width}}{row['documents']:11}{row['metric']:>13}"
        line += f"{row['score']:8.2f}{row['score_stderr']:6.2f}"
        lines.append(line + (f"{row['original_score']:10.2f}{row['lost']:7.2f}" if compared else ""))
    line = f"{'average':{width}}{'':24}{result['score']:8.2f}{'':6}"
    lines.append(line + (f"{result['original_score']:10.2f}{result['lost']:7.2f}" if compared else ""))
    return "\n".join(lines)


def as_lm(model: HarnessModel) -> Any:
    """Return the model as an object of the harness's `LM`, for `lm_eval.simple_evaluate`."""
    harness = _module("lm_eval.api.model")
    kind = type("TwlaLM", (HarnessModel, harness.LM), {})
    lm = kind.__new__(kind)
    harness.LM.__init__(lm)
    lm.__dict__.update(model.__dict__)
    return lm


def _rows(
    model: HarnessModel, tasks: Mapping[str, Any], names: Sequence[str], limit: int | None
) -> list[dict[str, Any]]:
    evaluator = _module("lm_eval.evaluator")
    # Bootstrapping is for metrics whose error has no formula; a hundred rounds are enough for those.
    found = evaluator.evaluate(as_lm(model), tasks, limit=limit, bootstrap_iters=100, log_samples=False)
    return rows_of(found, names)


def rows_of(found: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row a task from what the harness found; a group that has a score of its own stands for its tasks.

    Args:
      found: what the harness's `evaluate` returned.
      names: of the tasks that were asked for, which have a row in any case.
    """
    children, samples = found.get("group_subtasks", {}), found["n-samples"]

    def below(name: str) -> set[str]:
        direct = set(children.get(name, ()))
        return direct.union(*map(below, direct))

    scored = {
        name: figures for name, figures in found["results"].items() if any("," in key for key in figures)
    }
    inside = set().union(*map(below, scored)) - set(names)
    return [
        _row(name, figures, sum(samples[each]["effective"] for each in {name, *below(name)} & samples.keys()))
        for name, figures in scored.items()
        if name not in inside
    ]


def _row(name: str, figures: Mapping[str, Any], documents: int) -> dict[str, Any]:
    """Return a task's row, from the harness's `{"acc,none": …, "acc_stderr,none": …, "alias": …}`."""
    metrics = {key.split(",")[0]: value for key, value in figures.items() if "," in key}
    main = next((metric for metric in _METRICS if metric in metrics), None) or next(
        key for key in metrics if not key.endswith("_stderr")
    )
    error = metrics.get(f"{main}_stderr")
    return {
        "name": name,
        "documents": documents,
        **metrics,
        "metric": main,
        "score": 100 * metrics[main],
        "score_stderr": 100 * error if isinstance(error, float) else float("nan"),
    }


def _load(names: Sequence[str]) -> Mapping[str, Any]:
    """Return the harness's own task objects by name, as its `evaluate` takes them."""
    manager = _module("lm_eval.tasks").TaskManager
    ours = {name: _local(name) for name in names if name in task_names()}
    try:
        known = manager(include_defaults=any(ours.get(name) is None for name in names))
        return known.load([ours.get(name) or name for name in names])
    except Exception as error:  # of the harness and of `datasets`; all mean that a task could not be had
        where = f"; its file belongs into TWLA_DATA/{_FOLDER}" if None in ours.values() else ""
        said = " ".join(str(error).split())[:200]
        raise TwlaError(f"tasks {', '.join(names)}: cannot be had{where} ({said})") from None


def _local(name: str) -> dict[str, Any] | None:
    """Return the configuration of a task whose file lies in `TWLA_DATA`; None where it does not."""
    text = (configs_folder() / "tasks" / f"{name}.yaml").read_text(encoding="utf-8")
    config = _module("yaml").safe_load(text)
    folder = Path(os.environ.get("TWLA_DATA") or "", _FOLDER)
    files = {split: folder / file for split, file in config["dataset_kwargs"]["data_files"].items()}
    if not (os.environ.get("TWLA_DATA") and all(file.is_file() for file in files.values())):
        return None
    return {**config, "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}}}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the harness and `datasets` log, warnings included, and their bars from the terminal."""
    datasets = _module("datasets")
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _module(name: str) -> Any:
    """Return a module of the harness.

    Raises:
      TwlaError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TwlaError("tasks need lm-evaluation-harness: pip install 'twla-jax[eval]'") from None
