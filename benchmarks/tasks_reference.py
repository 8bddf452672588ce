"""Scores lm-evaluation-harness's own transformers model, to compare `twla eval --tasks` with.

    TWLA_DATA=… python benchmarks/tasks_reference.py MODEL --limit 50

MODEL is a Hugging Face folder or a .gguf file, in full precision. Needs PyTorch, gguf and `lm_eval[hf]`, and neither
JAX nor this library. Prints a JSON object: of each task the metrics in percent.
"""

import argparse
import json
from pathlib import Path

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tasks_by_file import task
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Score the tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tasks", default="hellaswag,arc_easy,piqa,boolq")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    path = Path(options.model)
    place = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **place).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(folder, **place)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    tasks = TaskManager(include_defaults=False).load([task(name) for name in options.tasks.split(",")])
    found = evaluate(lm, tasks, limit=options.limit, bootstrap_iters=0, log_samples=False)
    scores = {
        name: {
            key.split(",")[0]: 100 * value
            for key, value in figures.items()
            if key in ("acc,none", "acc_norm,none")
        }
        for name, figures in found["results"].items()
    }
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
