"""Compares refinements: one quantised model, refined by every variant, and the worst domain of each.

    TWLA_DATA=… python benchmarks/refine_trials.py smollm2 --steps 240 \\
        --variants base cooldown:cooldown=0.5 "hot:code_rate=1e-2,batch=8" own:own_text=0.25

A variant is a name and what it changes: any setting of the end-to-end refinement, and `text` (a corpus). `--bits 16 4`
scores every model with its inputs at 16 and at 4 bits, and a variant with `activation_bits=4` learns with them at 4:

    TWLA_DATA=… python benchmarks/refine_trials.py smollm2 --steps 1100 --bits 16 4 \\
        --variants a16:cooldown=0.5 a4:cooldown=0.5,activation_bits=4

Every variant sees `--steps` steps unless it sets its own, or as many
as `tokens` make. A line is printed as each is done, and a table of all at the end. TWLA_SMOLLM2 may name the GGUF file
that `smollm2` stands for.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from trials import keep, print_table

from twla_jax import recipe
from twla_jax.evaluation import domains, scoring
from twla_jax.jobs import loading
from twla_jax.models.decoder import Decoder, computing_in
from twla_jax.models.sites import set_activation_bits
from twla_jax.quantization import pipeline
from twla_jax.refinement import end_to_end
from twla_jax.refinement_settings import EndToEndSettings, RefineSettings
from twla_jax.text import corpora
from twla_jax.text.windows import Tokens, calibration_windows, domain_tokens, sample_windows

VARIANTS = (
    "base",
    "cooldown 0.5:cooldown=0.5",
    "batch 8:batch=8",
    "rates doubled:code_rate=1e-2,scale_rate=4e-3",
    "a quarter of its own text:own_text=0.25",
    "scales alone:code_rate=0,scale_rate=1e-2",
)
_OWN = ("text", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Says what one trial changes.

    Attributes:
      name: as the table has it.
      settings: of the end-to-end refinement, by name.
      own: `text` and `tokens`, where given.
    """

    name: str
    settings: dict[str, Any]
    own: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Read `name:key=value,key=value`; numbers are read as such."""
        name, _, changes = text.partition(":")
        values = {}
        for change in filter(None, changes.split(",")):
            key, _, value = change.partition("=")
            try:
                values[key] = json.loads(value)
            except ValueError:
                values[key] = value
        settings = {key: value for key, value in values.items() if key not in _OWN}
        return cls(name=name, settings=settings, own={key: values[key] for key in _OWN if key in values})


class Trials:
    """Holds the model, its quantised form that every variant starts from, and the texts."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        model = options.model
        if model == "smollm2":
            model = os.environ.get("TWLA_SMOLLM2") or model
        teacher, self._tokenizer = loading.load(model, dtype=jnp.float16)
        self._teacher = computing_in(teacher, jnp.float32)
        self._size = self._teacher.config.vocab_size
        first = {"count": options.max_windows, "seq_len": options.eval_seq_len}
        self._texts = {
            name: corpora.first_windows(text, self._tokenizer, self._size, **first)
            for name, text in corpora.load_domains(options.domains).items()
        }
        self._test = None
        if options.corpus:
            test = corpora.load_corpus(options.corpus, "evaluation")
            self._test = corpora.tokenize(test, self._tokenizer, self._size)
        base = dataclasses.replace(recipe.load_recipe(options.recipe), refine=RefineSettings())
        changes = {"corpus": options.text, "windows": options.windows, "seq_len": options.seq_len}
        changes["seed"] = options.seed
        self._recipe = base.updated(
            {"calibration": {key: value for key, value in changes.items() if value is not None}}
        )
        self._read: dict[str, tuple[int, Tokens]] = {}
        start = time.perf_counter()
        corpus = corpora.load_corpus(self._recipe.calibration.corpus, "calibration")
        windows = calibration_windows(corpus, self._tokenizer, self._size, self._recipe.calibration)
        self._quantized, _ = pipeline.quantize_blocks(
            self._teacher, windows, self._recipe.quantization, progress=False
        )
        self.start = {"variant": "unrefined", **self._score(self._quantized)}
        self.start["seconds"] = time.perf_counter() - start

    def run(self, variant: Variant) -> dict[str, Any]:
        """Refine by a variant, and return its figures."""
        options = self._options
        defaults = {"steps": options.steps, "batch": options.batch, "dtype": options.dtype}
        settings = EndToEndSettings(**(defaults | variant.settings))
        seq_len = min(settings.seq_len or options.refine_seq_len, options.refine_seq_len)
        if "tokens" in variant.own:
            steps = max(1, int(variant.own["tokens"]) // (settings.batch * seq_len))
            settings = dataclasses.replace(settings, steps=steps)
        start = time.perf_counter()
        windows = self._windows(variant, settings.steps * settings.batch, seq_len)
        drawn = time.perf_counter()
        model, figures = end_to_end.refine(
            self._quantized, self._teacher, windows, settings, progress=options.progress
        )
        done = time.perf_counter()
        return {
            "variant": variant.name,
            "settings": {**dataclasses.asdict(settings), **variant.own},
            "refine": figures,
            **self._score(model),
            "seconds": done - start,
            "seconds_text": drawn - start,
        }

    def _windows(self, variant: Variant, count: int, seq_len: int) -> np.ndarray:
        name = variant.own.get("text") or self._options.refine_text or self._recipe.calibration.corpus
        read, tokens = self._read.get(name, (0, ()))
        if read < count * seq_len:
            corpus = corpora.load_corpus(name, "calibration")
            tokens = domain_tokens(corpus, self._tokenizer, self._size, count * seq_len)
            self._read[name] = count * seq_len, tokens
        seed = self._recipe.calibration.seed + 1
        return sample_windows(tokens, count, seq_len, seed)

    def _score(self, model: Decoder) -> dict[str, Any]:
        model, teacher = (
            computing_in(each, self._options.dtype, fused=True) for each in (model, self._teacher)
        )
        settings = {"batch_size": self._options.eval_batch_size, "progress": False}
        found: dict[str, Any] = {}
        for bits in self._options.bits:
            narrow = set_activation_bits(model, bits)
            result = domains.evaluate_domains(narrow, self._texts, original=teacher, **settings)
            found |= {_key("domains", bits): result["domains"], f"A{bits}": None}
            if self._test is not None:
                whole = scoring.evaluate(
                    narrow,
                    self._test,
                    seq_len=self._options.test_seq_len,
                    max_windows=self._options.test_windows,
                    **(settings | {"batch_size": 4}),
                )
                found[f"A{bits}"] = whole["perplexity"]
        return found


def _key(name: str, bits: int) -> str:
    """Return the name of a figure with its bits; at 16 without."""
    return name if bits == 16 else f"{name} A{bits}"


def _measured(found: dict[str, Any]) -> list[int]:
    """Return the bits at which a variant was scored."""
    return [bits for bits in (16, 8, 6, 4, 2) if f"A{bits}" in found]


def line(found: dict[str, Any]) -> str:
    """Return the figures of one variant in one line."""
    said = []
    for bits in _measured(found):
        rows = found[_key("domains", bits)]
        mean = float(np.exp(np.mean(np.log([row["ratio"] for row in rows]))))
        said.append(f"{_key('worst', bits)} {rows[-1]['ratio']:.3f} ({rows[-1]['name']}), mean {mean:.3f}")
        if found[f"A{bits}"] is not None:
            said.append(f"A{bits} {found[f'A{bits}']:.2f}")
    if "refine" in found:
        said.append(f"{found['refine']['flipped']:.1%} of codes flipped")
    return f"{found['variant']}: {', '.join(said)}, {found['seconds']:.0f} s"


def table(results: list[dict[str, Any]]) -> str:
    """Return Markdown: a row a variant and a width of the inputs, its ratio in every domain, and the worst of them."""
    first = _key("domains", _measured(results[0])[0])
    names = sorted({row["name"] for found in results for row in found[first]})
    lines = [
        f"| variant | bits | perplexity | worst | {' | '.join(names)} | s |",
        "|---" * (len(names) + 5) + "|",
    ]
    for found in results:
        for bits in _measured(found):
            ratios = {row["name"]: row["ratio"] for row in found[_key("domains", bits)]}
            test = "" if found[f"A{bits}"] is None else f"{found[f'A{bits}']:.2f}"
            cells = " | ".join(f"{ratios[name]:.2f}" for name in names)
            lines.append(
                f"| {found['variant']} | A{bits} | {test} | {max(ratios.values()):.2f} | {cells} |"
                f" {found['seconds']:.0f} |"
            )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = {"type": int, "metavar": "N"}
    parser.add_argument("model", nargs="?", default="smollm2", help="full-precision model, as twla takes it")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME:KEY=VALUE,…")
    parser.add_argument(
        "--recipe", default="w1.58-g128", help="that quantises; its own refinement is left out"
    )
    parser.add_argument("--text", default=None, help="calibration text; the recipe's if not given")
    parser.add_argument("--refine-text", default=None, help="text to refine on; that of the calibration")
    parser.add_argument("--windows", default=None, help="of the calibration", **number)
    parser.add_argument("--seq-len", default=None, help="of the calibration", **number)
    parser.add_argument("--steps", default=240, **number)
    parser.add_argument("--batch", default=4, **number)
    parser.add_argument("--refine-seq-len", default=2048, **number)
    parser.add_argument("--dtype", default="bfloat16", help="of refinement and scoring")
    parser.add_argument("--domains", default="mix", help="evaluation texts, as twla eval takes them")
    parser.add_argument("--max-windows", default=6, help="of each evaluation text", **number)
    parser.add_argument("--eval-seq-len", default=1024, **number)
    parser.add_argument("--eval-batch-size", default=2, **number)
    parser.add_argument("--corpus", default="wikitext2", help="whose perplexity is shown; '' for none")
    parser.add_argument(
        "--bits",
        nargs="+",
        type=int,
        default=[16],
        choices=(16, 8, 6, 4, 2),
        help="of the inputs, to score at",
    )
    parser.add_argument("--test-seq-len", default=2048, **number)
    parser.add_argument("--test-windows", default=None, help="of that text, all if not given", **number)
    parser.add_argument("--seed", default=0, **number)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no variant later than that"
    )
    parser.add_argument("--results", type=Path, default=None, help="JSON lines, added to")
    parser.add_argument("--progress", action="store_true")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every variant for which there is time, and print a line as each is done."""
    started = time.perf_counter()
    trials, results = Trials(options), []
    for variant in [None, *map(Variant.parse, options.variants)]:
        if variant and time.perf_counter() - started > options.seconds:
            print(f"refine_trials: {options.seconds:g} s are over before '{variant.name}'", file=sys.stderr)
            break
        results.append(trials.run(variant) if variant else trials.start)
        keep(results[-1], line(results[-1]), options.results)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Runs, and prints the table."""
    print_table("refine_trials", lambda: table(run(parse(arguments))))


if __name__ == "__main__":
    main()
