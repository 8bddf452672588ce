"""Scores tasks where the harness and the accelerator are on different machines: the requests go there in a file.

    TWLA_DATA=… python benchmarks/tasks_by_file.py record requests.json          # needs lm_eval
    python benchmarks/tasks_by_file.py answer requests.json MODEL answers.json   # needs this library
    python benchmarks/tasks_by_file.py transformers requests.json FOLDER answers.json   # needs lm_eval and PyTorch
    TWLA_DATA=… python benchmarks/tasks_by_file.py score requests.json ANSWERS.json …

`transformers` answers with the harness's own model of that name, for a folder that `twla export --format hf` wrote.
`score` prints the harness's own figures of every file of answers, points lost against the first, and for how many
documents another choice is the likeliest than in the first.
"""

import argparse
import json
import os
import types
from pathlib import Path
from typing import Any

TASKS = "hellaswag,arc_easy,piqa,boolq"


def harness(
    tasks: list[str], limit: int | None, answer: Any
) -> tuple[dict[str, dict[str, float]], list[int]]:
    """Return the harness's metrics in percent by task, and the choice that is the likeliest for each document.

    Args:
      tasks: names.
      limit: documents of each.
      answer: takes requests and returns their log-likelihoods.
    """
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
    found = evaluate(Filed(), loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    metrics = {
        name: {
            key.split(",")[0]: 100 * value
            for key, value in figures.items()
            if key in ("acc,none", "acc_norm,none")
        }
        for name, figures in found["results"].items()
    }
    return metrics, [
        likeliest(sample, by_length="acc_norm" in metrics[name])
        for name, samples in sorted(found["samples"].items())
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]


def likeliest(sample: dict[str, Any], *, by_length: bool) -> int:
    """Return the choice with the highest log-likelihood; where `by_length`, the highest for each of its letters."""
    values = [value for value, _ in sample["filtered_resps"]]
    if by_length:  # the harness puts a space before a choice
        values = [
            value / len(choice.removeprefix(" "))
            for value, (_, choice) in zip(values, sample["arguments"], strict=True)
        ]
    return values.index(max(values))


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


def answer_with_transformers(options: argparse.Namespace) -> None:
    """Write the log-likelihood of every request by the harness's own model of a Hugging Face folder."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=str(options.model),
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        max_length=2048,
    )
    asked = json.loads(options.requests.read_text(encoding="utf-8"))["requests"]
    requests = [Instance("loglikelihood", {}, tuple(args), index) for index, args in enumerate(asked)]
    options.answers.write_text(json.dumps(lm.loglikelihood(requests)), encoding="utf-8")


def score(options: argparse.Namespace) -> None:
    """Print a row for every file of answers."""
    whole = json.loads(options.requests.read_text(encoding="utf-8"))
    rows = []
    for path in options.answers:
        answers = dict(
            zip(map(tuple, whole["requests"]), map(tuple, json.loads(path.read_text())), strict=True)
        )
        figures, choices = harness(
            whole["tasks"],
            whole["limit"],
            lambda asked, found=answers: [found[tuple(each)] for each in asked],
        )
        scores = [metrics.get("acc_norm", metrics["acc"]) for metrics in figures.values()]
        rows.append((path.stem, choices, *scores, sum(scores) / len(scores)))
    print(
        "| | "
        + " | ".join(whole["tasks"])
        + f" | average | lost | other answers of {len(rows[0][1])} |\n"
        + "|---" * (len(whole["tasks"]) + 4)
        + "|"
    )
    for name, choices, *scores in rows:
        lost = rows[0][-1] - scores[-1]
        others = sum(one != other for one, other in zip(rows[0][1], choices, strict=True))
        print(f"| {name} | " + " | ".join(f"{each:.2f}" for each in scores) + f" | {lost:.2f} | {others} |")


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
    other = steps.add_parser("transformers")
    other.add_argument("requests", type=Path)
    other.add_argument("model", type=Path)
    other.add_argument("answers", type=Path)
    other.add_argument("--batch-size", type=int, default=8)
    other.add_argument("--device", default="cpu")
    other.add_argument("--dtype", default="float32")
    other.set_defaults(run=answer_with_transformers)
    three = steps.add_parser("score")
    three.add_argument("requests", type=Path)
    three.add_argument("answers", type=Path, nargs="+")
    three.set_defaults(run=score)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
