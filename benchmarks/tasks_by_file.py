"""Scores tasks where the harness and the accelerator are on different machines: the requests go there in a file.

    TWLA_DATA=… python benchmarks/tasks_by_file.py record requests.json          # needs lm_eval
    python benchmarks/tasks_by_file.py answer requests.json MODEL answers.json   # needs this library
    TWLA_DATA=… python benchmarks/tasks_by_file.py score requests.json ANSWERS.json …

`score` prints the harness's own figures of every file of answers, and points lost against the first.
"""

import argparse
import json
import os
import types
from pathlib import Path
from typing import Any

TASKS = "hellaswag,arc_easy,piqa,boolq"


def harness(tasks: list[str], limit: int | None, answer: Any) -> dict[str, dict[str, float]]:
    """Return the harness's metrics in percent by task; `answer` takes requests and returns log-likelihoods."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    class Filed(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return answer([list(request.args) for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    loaded = TaskManager(include_defaults=False).load([task(name) for name in tasks])
    found = evaluate(Filed(), loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    return {
        name: {key.split(",")[0]: 100 * value for key, value in figures.items() if key.startswith("acc")}
        for name, figures in found["results"].items()
    }


def task(name: str) -> dict[str, Any]:
    """Return the configuration of a task with its file in `TWLA_DATA`."""
    import yaml

    configs = Path(__file__).resolve().parents[1] / "configs" / "tasks"
    config = yaml.safe_load((configs / f"{name}.yaml").read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]
    folder = Path(os.environ["TWLA_DATA"], "zeroshot")
    files.update({split: str(folder / file) for split, file in files.items()})
    return config


def record(options: argparse.Namespace) -> None:
    """Write what the harness asks."""
    asked: list[list[str]] = []

    def keep(requests: list[list[str]]) -> list[tuple[float, bool]]:
        asked.extend(requests)
        return [(0.0, False)] * len(requests)

    tasks = options.tasks.split(",")
    harness(tasks, options.limit, keep)
    whole = {"tasks": tasks, "limit": options.limit, "requests": asked}
    options.requests.write_text(json.dumps(whole), encoding="utf-8")
    print(f"{len(asked)} requests")


def answer(options: argparse.Namespace) -> None:
    """Write the log-likelihood of every request."""
    from twla_jax import xla_flags
    from twla_jax.evaluation.harness import HarnessModel
    from twla_jax.jobs import loading
    from twla_jax.models.decoder import computing_in
    from twla_jax.models.sites import set_activation_bits

    xla_flags.disable_triton_gemm()
    model, tokenizer = loading.load(options.model)
    if options.activation_bits:
        model = set_activation_bits(model, options.activation_bits)
    model = computing_in(model, options.dtype, fused=True)
    asked = json.loads(options.requests.read_text(encoding="utf-8"))["requests"]
    requests = [types.SimpleNamespace(args=tuple(args)) for args in asked]
    lm = HarnessModel(model, tokenizer, batch_tokens=options.batch_tokens, max_length=2048)
    options.answers.write_text(json.dumps(lm.loglikelihood(requests)), encoding="utf-8")


def score(options: argparse.Namespace) -> None:
    """Print a row for every file of answers."""
    whole = json.loads(options.requests.read_text(encoding="utf-8"))
    rows = []
    for path in options.answers:
        answers = dict(
            zip(map(tuple, whole["requests"]), map(tuple, json.loads(path.read_text())), strict=True)
        )
        figures = harness(
            whole["tasks"],
            whole["limit"],
            lambda asked, found=answers: [found[tuple(each)] for each in asked],
        )
        scores = [metrics.get("acc_norm", metrics["acc"]) for metrics in figures.values()]
        rows.append((path.stem, *scores, sum(scores) / len(scores)))
    print(
        "| | "
        + " | ".join(whole["tasks"])
        + " | average | lost |\n"
        + "|---" * (len(whole["tasks"]) + 3)
        + "|"
    )
    for name, *scores in rows:
        lost = rows[0][-1] - scores[-1]
        print(f"| {name} | " + " | ".join(f"{each:.2f}" for each in scores) + f" | {lost:.2f} |")


def main() -> None:
    """Runs one of the three steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(required=True)
    one = steps.add_parser("record")
    one.add_argument("requests", type=Path)
    one.add_argument("--tasks", default=TASKS)
    one.add_argument("--limit", type=int, default=None)
    one.set_defaults(run=record)
    two = steps.add_parser("answer")
    two.add_argument("requests", type=Path)
    two.add_argument("model")
    two.add_argument("answers", type=Path)
    two.add_argument("--activation-bits", type=int, default=None)
    two.add_argument("--batch-tokens", type=int, default=16384)
    two.add_argument("--dtype", default="bfloat16")
    two.set_defaults(run=answer)
    three = steps.add_parser("score")
    three.add_argument("requests", type=Path)
    three.add_argument("answers", type=Path, nargs="+")
    three.set_defaults(run=score)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
