"""Compares ways of quantising without refinement: every variant with every seed, and the worst domain of each.

    TWLA_DATA=… python benchmarks/unrefined_trials.py smollm2 --seeds 0 1 2 --seconds 380 --variants \\
        base "more:calibration.windows=512,calibration.seq_len=1024" damped:weights.compensation.damping=0.03

A variant is a name and what it changes in the recipe: keys with dots between a table and what is in it. A seed is that
of the windows and of the rotations, as `twla quantize --seed` has it, unless a variant sets one of them; `NAME@1+2:…`
runs with these seeds alone. `trial.scales=100` lets scales and norms alone learn for 100 steps, at `trial.rate`. A line
is printed as each is done, and a table of all at the end. Nothing begins once `--seconds` are over. TWLA_SMOLLM2 may
name the GGUF file that `smollm2` stands for.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from trials import keep, print_table

from twla_jax import recipe
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.settings import QuantizationSettings
from twla_jax.evaluation import domains, scoring
from twla_jax.jobs import loading
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.quantization import pipeline, rotation_fitting
from twla_jax.refinement import end_to_end
from twla_jax.refinement_settings import EndToEndSettings, RefineSettings
from twla_jax.text import corpora
from twla_jax.text.windows import domain_tokens, sample_windows


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name of `name:table.key=value,…`, and its changes as nested tables."""
    name, _, changes = text.partition(":")
    tables: dict[str, Any] = {}
    for change in filter(None, changes.split(",")):
        path, _, value = change.partition("=")
        *outer, key = path.split(".")
        here = tables
        for part in outer:
            here = here.setdefault(part, {})
        try:
            here[key] = json.loads(value)
        except ValueError:
            here[key] = value
    return name, tables


class Trials:
    """Holds the model, the texts, and the rotations that were fitted, which several variants share."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        model = options.model
        if model == "smollm2":
            model = os.environ.get("TWLA_SMOLLM2") or model
        teacher, self._tokenizer = loading.load(model, dtype=jnp.float16)
        self._teacher = computing_in(teacher, jnp.float32)
        self._size = self._teacher.config.vocab_size
        self._base = dataclasses.replace(recipe.load_recipe(options.recipe), refine=RefineSettings())
        self._corpus = corpora.load_corpus(self._base.calibration.corpus, "calibration")
        self._tokens: tuple[int, Any] = (0, ())
        self._texts = {
            name: corpora.first_windows(
                text, self._tokenizer, self._size, options.max_windows, options.eval_seq_len
            )
            for name, text in corpora.load_domains(options.domains).items()
        }
        self._test = None
        if options.test_windows:
            test = corpora.load_corpus("wikitext2", "evaluation")
            self._test = corpora.first_windows(test, self._tokenizer, self._size, options.test_windows, 2048)
        self._rotations: dict[Any, dict[str, KroneckerRotation]] = {}

    def run(self, name: str, changes: dict[str, Any], seed: int) -> dict[str, Any]:
        """Quantise by a variant with a seed, and return its figures."""
        seeded = self._base.updated({"calibration": {"seed": seed}})
        if seeded.rotation is not None:
            seeded = seeded.updated({"rotation": {"seed": seed}})
        changes = dict(changes)
        own = changes.pop("trial", {})
        settings = seeded.updated(changes)
        windows = self._windows(settings)
        start = time.perf_counter()
        rotations = self._fitted(settings.quantization)
        fitted = time.perf_counter()
        model, found = pipeline.quantize_blocks(
            self._teacher,
            windows,
            settings.quantization,
            rotations=rotations,
            progress=False,
        )
        done = time.perf_counter()
        if "scales" in own:
            model = self._with_scales(model, windows.shape[1], own["scales"], own.get("rate", 5e-3), seed + 1)
        tuned = time.perf_counter()
        scored = {"batch_size": self._options.eval_batch_size, "progress": False}
        student, original = (computing_in(each, "bfloat16", fused=True) for each in (model, self._teacher))
        result = {
            "variant": name,
            "seed": seed,
            "tokens": int(windows.size),
            "seconds": {"rotations": fitted - start, "blocks": done - fitted, "scales": tuned - done},
            "output_error": float(np.mean([site["output_error"] for site in found["sites"]])),
            "domains": domains.evaluate_domains(student, self._texts, original=original, **scored)["domains"],
        }
        if self._test is not None:
            whole = scoring.evaluate(student, self._test, **scored)
            result["perplexity"] = whole["perplexity"]
        return result

    def _with_scales(self, model: Decoder, seq_len: int, steps: int, rate: float, seed: int) -> Decoder:
        """Return the model after so many steps in which scales and norms alone learn."""
        settings = EndToEndSettings(
            steps=steps, batch=8192 // seq_len, code_rate=0, scale_rate=rate, cooldown=0.5
        )
        windows = sample_windows(self._tokens[1], steps * settings.batch, seq_len, seed)
        return end_to_end.refine(model, self._teacher, windows, settings, progress=False)[0]

    def _windows(self, settings: recipe.Recipe) -> np.ndarray:
        drawn = settings.calibration
        wanted = drawn.windows * drawn.seq_len
        if self._tokens[0] < wanted:
            self._tokens = (
                wanted,
                domain_tokens(self._corpus, self._tokenizer, self._size, wanted),
            )
        return sample_windows(self._tokens[1], drawn.windows, drawn.seq_len, drawn.seed)

    def _fitted(self, settings: QuantizationSettings) -> dict[str, KroneckerRotation]:
        rotation = settings.rotation
        if rotation not in self._rotations:
            self._rotations[rotation], _ = rotation_fitting.fit_rotations(
                self._teacher, {}, rotation, None, None, False
            )
        return self._rotations[rotation]


def line(found: dict[str, Any]) -> str:
    """Return the figures of one run in one line."""
    rows = found["domains"]
    mean = float(np.exp(np.mean(np.log([row["ratio"] for row in rows]))))
    each = ", ".join(f"{row['name']} {row['ratio']:.2f}" for row in rows[::-1])
    test = f", WikiText-2 {found['perplexity']:.1f}" if "perplexity" in found else ""
    seconds = found["seconds"]
    return (
        f"{found['variant']}, seed {found['seed']}: worst {rows[-1]['ratio']:.2f}, mean {mean:.3f}{test};"
        f" output error {found['output_error']:.4f}; rotations {seconds['rotations']:.0f} s, blocks"
        f" {seconds['blocks']:.0f} s, scales {seconds['scales']:.0f} s; {each}"
    )


def table(results: list[dict[str, Any]]) -> str:
    """Return Markdown: a row a variant, the worst ratio of every seed, and what all of them take on average."""
    names = sorted({row["name"] for row in results[0]["domains"]})
    lines = [f"| variant | worst by seed | s | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for variant in dict.fromkeys(found["variant"] for found in results):
        runs = [found for found in results if found["variant"] == variant]
        ratios = [{row["name"]: row["ratio"] for row in found["domains"]} for found in runs]
        worst = ", ".join(f"{max(each.values()):.2f}" for each in ratios)
        seconds = np.mean([sum(found["seconds"].values()) for found in runs])
        cells = " | ".join(f"{np.mean([each[name] for each in ratios]):.2f}" for name in names)
        lines.append(f"| {variant} | {worst} | {seconds:.0f} | {cells} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = {"type": int, "metavar": "N"}
    parser.add_argument("model", nargs="?", default="smollm2", help="full-precision model, as twla takes it")
    parser.add_argument("--variants", nargs="+", default=["base"], metavar="NAME:TABLE.KEY=VALUE,…")
    parser.add_argument("--seeds", nargs="+", default=[0, 1, 2], **number)
    parser.add_argument("--recipe", default="w1.58-g128", help="whose refinement is left out")
    parser.add_argument("--domains", default="mix", help="evaluation texts, as twla eval takes them")
    parser.add_argument("--max-windows", default=6, help="of each evaluation text", **number)
    parser.add_argument("--eval-seq-len", default=1024, **number)
    parser.add_argument("--eval-batch-size", default=2, **number)
    parser.add_argument("--test-windows", default=16, help="of WikiText-2's test split, 0 for none", **number)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing later than that")
    parser.add_argument("--results", type=Path, default=None, help="JSON lines, added to")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every variant with every seed for which there is time, and print a line as each is done."""
    started = time.perf_counter()
    trials, results = Trials(options), []
    for name, changes in map(parse_variant, options.variants):
        name, _, own = name.partition("@")
        for seed in map(int, own.split("+")) if own else options.seeds:
            if results and time.perf_counter() - started > options.seconds:
                print(f"unrefined_trials: {options.seconds:g} s are over before '{name}', seed {seed}")
                return results
            results.append(trials.run(name, changes, seed))
            keep(results[-1], line(results[-1]), options.results)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Runs, and prints the table."""
    print_table("unrefined_trials", lambda: table(run(parse(arguments))))


if __name__ == "__main__":
    main()
