"""Measures what calibration text is worth: every recipe on every text, and the worst domain of each.

    TWLA_DATA=… python benchmarks/domains.py smollm2

A model is quantised by each recipe on so many tokens of each calibration text, and scored against the original on the
evaluation text of every domain of `--domains`. A line is printed as each is done, and a table of all at the end, the
ratio of perplexities in every domain. TWLA_SMOLLM2 may name the GGUF file that `smollm2` stands for.
"""

import argparse
import dataclasses
import itertools
import os
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from trials import keep, print_table

from twla_jax import recipe
from twla_jax.evaluation.domains import evaluate_domains
from twla_jax.jobs import loading
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.quantization import pipeline
from twla_jax.refinement_settings import RefineSettings
from twla_jax.text import corpora
from twla_jax.text.windows import calibration_windows


def measure(
    teacher: Decoder,
    tokenizer: Any,
    settings: recipe.Recipe,
    texts: dict[str, np.ndarray],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the domains' rows of a model quantised by a recipe, the seconds it took, and its calibration."""
    start = time.perf_counter()
    corpus = corpora.load_corpus(settings.calibration.corpus, "calibration")
    windows = calibration_windows(corpus, tokenizer, teacher.config.vocab_size, settings.calibration)
    read = time.perf_counter()
    model, _ = pipeline.quantize_blocks(teacher, windows, settings.quantization, progress=False)
    done = time.perf_counter()
    result = evaluate_domains(model, texts, original=teacher, progress=False, **options)
    return {
        "recipe": settings.name,
        "calibration": corpus.name,
        "tokens": int(windows.size),
        "seconds": {"text": read - start, "quantise": done - read},
        "domains": result["domains"],
    }


def line(found: dict[str, Any]) -> str:
    """Return the figures of one run in one line."""
    rows = found["domains"]
    mean = float(np.exp(np.mean(np.log([row["ratio"] for row in rows]))))
    wikitext = "".join(f", WikiText-2 {row['perplexity']:.1f}" for row in rows if row["name"] == "wikitext2")
    return (
        f"{found['recipe']} on {found['calibration']}, {found['tokens']} tokens: worst {rows[-1]['ratio']:.2f}"
        f" ({rows[-1]['name']}), mean {mean:.2f}{wikitext}; quantised in {found['seconds']['quantise']:.0f} s"
    )


def table(results: list[dict[str, Any]]) -> str:
    """Return Markdown: a row a run, its ratio in every domain and the worst of them."""
    names = sorted({row["name"] for found in results for row in found["domains"]})
    lines = [
        f"| recipe | calibration | tokens | worst | {' | '.join(names)} |",
        "|---" * (len(names) + 4) + "|",
    ]
    for found in results:
        ratios = {row["name"]: row["ratio"] for row in found["domains"]}
        cells = [f"{ratios[name]:.2f}" for name in names]
        lines.append(
            f"| {found['recipe']} | {found['calibration']} | {found['tokens']} | {max(ratios.values()):.2f} |"
            f" {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = {"type": int, "metavar": "N"}
    parser.add_argument("model", nargs="?", default="smollm2", help="full-precision model, as twla takes it")
    parser.add_argument("--recipes", nargs="+", default=["w1.58-g128"])
    parser.add_argument("--calibrations", nargs="+", default=["wikitext2", "mix"])
    parser.add_argument("--tokens", nargs="+", default=[2**14, 2**17], help="of the calibration", **number)
    parser.add_argument("--calibration-seq-len", default=1024, **number)
    parser.add_argument("--domains", default="mix", help="evaluation texts, as twla eval takes them")
    parser.add_argument("--seq-len", default=1024, help="of the evaluation", **number)
    parser.add_argument("--max-windows", default=6, help="of each evaluation text", **number)
    parser.add_argument("--batch-size", default=2, help="windows scored at a time", **number)
    parser.add_argument("--seed", default=0, **number)
    parser.add_argument("--results", type=Path, default=None, help="JSON lines, added to")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every recipe on every text, and prints a line as each is done."""
    model = os.environ.get("TWLA_SMOLLM2") or options.model if options.model == "smollm2" else options.model
    teacher, tokenizer = loading.load(model, dtype=jnp.float16)
    teacher = computing_in(teacher, jnp.float32)
    size = teacher.config.vocab_size
    texts = {
        name: corpora.first_windows(text, tokenizer, size, options.max_windows, options.seq_len)
        for name, text in corpora.load_domains(options.domains).items()
    }
    results = []
    for name, tokens, corpus in itertools.product(options.recipes, options.tokens, options.calibrations):
        base = recipe.load_recipe(name)
        seq_len = options.calibration_seq_len
        drawn = dataclasses.replace(
            base.calibration,
            corpus=corpus,
            windows=max(1, tokens // seq_len),
            seq_len=seq_len,
            seed=options.seed,
        )
        settings = dataclasses.replace(base, calibration=drawn, refine=RefineSettings())
        found = measure(teacher, tokenizer, settings, texts, {"batch_size": options.batch_size})
        results.append(found)
        keep(found, line(found), options.results)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Runs, and prints the table."""
    print_table("domains", lambda: table(run(parse(arguments))))


if __name__ == "__main__":
    main()
