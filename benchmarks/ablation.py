"""Measures what each part of the refined recipe is worth: one change a row, over seeds, on one GPU.

    python benchmarks/ablation.py smollm2 --results ablation.jsonl

A model is quantised on `--calibration`, refined on `--refine-text`, and scored on the evaluation text of `--corpus`
with its activations off (A16) and at 4 bits (A4). Every row changes one thing. A seed moves the rotations' start and
the windows that are drawn. Each finished (row, seed) is a line of `--results`; those found there are not run again.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from trials import print_table

from twla_jax import recipe
from twla_jax.evaluation import scoring
from twla_jax.jobs import loading, stages
from twla_jax.models import sites
from twla_jax.models.decoder import computing_in
from twla_jax.reports.run import Phases
from twla_jax.text import corpora, recipe_windows
from twla_jax.text.windows import sample_windows

_BITS = (16, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One change from the base: of a recipe's part, or of the refinement's text.

    Attributes:
      change: new values by part of the recipe.
      narrow: refine on the text of the quantisation alone.
    """

    change: dict[str, Any] = dataclasses.field(default_factory=dict)
    narrow: bool = False

    def recipe(self, base: recipe.Recipe) -> recipe.Recipe:
        """The base with this row's change."""
        return base.updated(self.change)


ROWS = {
    "base": Row(),
    "no refinement": Row(change={"refine": {"end_to_end": False}}),
    "codes frozen in refinement": Row(change={"refine": {"end_to_end": {"code_rate": 0.0}}}),
    "scales and norms frozen in refinement": Row(change={"refine": {"end_to_end": {"scale_rate": 0.0}}}),
    "rotations learn in refinement": Row(change={"refine": {"end_to_end": {"rotation_rate": 5e-3}}}),
    "refined with inputs at 4 bits": Row(change={"refine": {"end_to_end": {"activation_bits": 4}}}),
    "clips trained at 4 bits afterwards": Row(change={"refine": {"clips": {"steps": 40}}}),
    "refined block by block first": Row(change={"refine": {"blocks": {"steps": 60}}}),
    "refined on the quantisation's text alone": Row(narrow=True),
    "no sweeps of the codes (rounds 0)": Row(change={"weights": {"ternary": {"rounds": 0}}}),
    "no rotation": Row(change={"rotation": False}),
    "range of inputs in the rotations' loss, 0.1": Row(change={"rotation": {"range_weight": 0.1}}),
    "range of inputs in the rotations' loss, 1": Row(change={"rotation": {"range_weight": 1.0}}),
    "no propagation": Row(change={"weights": {"compensation": {"propagation": 0.0}}}),
    "neither propagation nor error compensation": Row(change={"weights": {"compensation": False}}),
}


class Bench:
    """The model and the texts of an ablation, and the last quantised model, which rows share."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._teacher, tokenizer = loading.load(options.model, dtype=jnp.float16)
        size = self._teacher.config.vocab_size

        def read(name, split):
            return corpora.tokenize(corpora.load_corpus(name, split), tokenizer, size)

        self._calibration, self._refine_text = (
            read(name, "calibration") for name in (options.calibration, options.refine_text)
        )
        self._test = scoring.cut_windows(read(options.corpus, "evaluation"), options.seq_len)
        self._shared: tuple[Any, Any] = (None, None)

    def run(self, row: Row, settings: recipe.Recipe) -> dict[str, Any]:
        """Return perplexities, the refinement's figures and the seconds of each stage, JSON-ready."""
        phases = Phases(verbose=False)
        text = self._calibration if row.narrow else self._refine_text
        drawn, seq_len = settings.calibration, self._options.seq_len
        work = stages.Work(
            teacher=self._teacher,
            text=recipe_windows.DrawnText(
                calibration=sample_windows(self._calibration, drawn.windows, drawn.seq_len, drawn.seed),
                refinement=sample_windows(text, settings.refine.windows, seq_len, drawn.seed + 1),
                held_out=None,
                overlap=0.0,
                description={},
            ),
            recipe=settings,
            progress=False,
        )
        first, *others = stages.WEIGHT_STAGES
        if self._shared[0] != (settings.quantization, drawn):
            model = computing_in(self._teacher, jnp.float32, fused=True)
            quantized, _ = stages.run_stages([first], model, work, phases)
            self._shared = (settings.quantization, drawn), quantized
        model, figures = stages.run_stages(others, self._shared[1], work, phases)
        with phases("evaluate"):
            scores = {f"A{bits}": self._score(model, bits) for bits in _BITS}
        return {**scores, "refine": figures.get("refine"), "seconds": phases.seconds}

    def _score(self, model: Any, bits: int) -> float:
        model = computing_in(sites.set_activation_bits(model, bits), self._options.dtype, fused=True)
        options = {"max_windows": self._options.max_windows, "batch_size": self._options.batch_size}
        return float(scoring.evaluate(model, self._test, progress=False, **options)["perplexity"])


def ablate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs what `--results` lacks, until `--seconds` have passed, and returns every result of these settings."""
    started = time.perf_counter()
    ignored = ("results", "seconds", "rows", "seeds")
    base = recipe.load_recipe(options.recipe).updated({"refine": {"end_to_end": {"steps": options.steps}}})
    base = dataclasses.replace(
        base,
        calibration=dataclasses.replace(
            base.calibration, corpus=options.calibration, windows=options.windows, seq_len=options.seq_len
        ),
    )
    settings = {key: value for key, value in vars(options).items() if key not in ignored}
    results = [
        line
        for line in map(
            json.loads, options.results.read_text().splitlines() if options.results.exists() else []
        )
        if line["settings"] == settings
    ]
    done = {(line["row"], line["seed"]) for line in results}
    wanted = [(name, seed) for seed in options.seeds for name in options.rows if (name, seed) not in done]
    bench = Bench(options) if wanted else None
    for count, (name, seed) in enumerate(wanted):
        if time.perf_counter() - started > options.seconds:
            print(f"ablation: {options.seconds:g} s are over, {len(wanted) - count} left", file=sys.stderr)
            break
        seeded = dataclasses.replace(
            base,
            calibration=dataclasses.replace(base.calibration, seed=seed),
            rotation=base.rotation and dataclasses.replace(base.rotation, seed=seed),
        )
        line = {"row": name, "seed": seed, **bench.run(ROWS[name], ROWS[name].recipe(seeded))}
        line["settings"] = settings
        with options.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        results.append(line)
        spent = ", ".join(f"{stage} {value:.1f} s" for stage, value in line["seconds"].items())
        scores = ", ".join(f"A{bits} {line[f'A{bits}']:.2f}" for bits in _BITS)
        print(f"ablation: {name}, seed {seed}: {scores} ({spent})", file=sys.stderr, flush=True)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: of every row the mean over its seeds, ± their standard deviation where there are several."""
    lines = [
        "| | " + " | ".join(f"A{bits}" for bits in _BITS) + " | seeds |",
        "|---" * (len(_BITS) + 2) + "|",
    ]
    for name in ROWS:
        here = [line for line in results if line["row"] == name]
        if here:
            cells = [_mean([line[f"A{bits}"] for line in here]) for bits in _BITS]
            seeds = ", ".join(str(seed) for seed in sorted(line["seed"] for line in here))
            lines.append(f"| {name} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = {"type": int, "metavar": "N"}
    parser.add_argument("model", help="full-precision model, as twla takes it")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, added to")
    parser.add_argument("--recipe", default="w1.58-g128")
    parser.add_argument("--steps", default=120, help="of the refinement", **number)
    parser.add_argument("--windows", default=64, help="calibration windows of the quantisation", **number)
    parser.add_argument("--seq-len", default=2048, **number)
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--refine-text", default="wikitext2+wikitext2-train+c4")
    parser.add_argument("--corpus", default="wikitext2", help="evaluation text")
    parser.add_argument("--max-windows", default=None, help="score only the first so many", **number)
    parser.add_argument("--batch-size", default=4, help="windows scored at a time", **number)
    parser.add_argument("--dtype", default="bfloat16", help="of the scoring")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", default=[0, 1, 2], **number)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row later than that")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs, and prints the table."""
    print_table("ablation", lambda: table(ablate(parse(arguments))))


if __name__ == "__main__":
    main()
