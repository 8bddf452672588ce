"""Compares recipes: perplexity against the bytes that are really stored.

Every row is a folder that `quantize_model.quantize_to_folder` wrote, counted by `accounting.account` and scored by
`scoring.evaluate`; baselines are recipes like any other.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from twla_jax import schema
from twla_jax.core.activation import OFF
from twla_jax.errors import TwlaError
from twla_jax.jobs import loading, places, quantize_model
from twla_jax.jobs.scores import Measured, Scorer
from twla_jax.models.config import check_length
from twla_jax.models.io import readers
from twla_jax.recipe import Recipe
from twla_jax.reports import plotting
from twla_jax.reports.run import Phases, environment
from twla_jax.schema import check_values
from twla_jax.storage import accounting, checkpoint, folders, locks
from twla_jax.text import corpora

RESULTS = "compare.json"
_REPORT = {key: schema.mapping() for key in ("model", "calibration", "seconds")}


@places.writes_into(RESULTS)
def compare_recipes(
    model_name: str | Path,
    entries: Sequence[Recipe | Path],
    out: str | Path,
    *,
    corpus: str,
    seq_len: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 1,
    activation_bits: Sequence[int] = (OFF,),
    plot: str | Path | None = None,
    dtype: str = "float32",
    progress: bool = True,
) -> dict[str, Any]:
    """Quantise a model by each recipe, and score the results and the model itself on one text.

    What is done stays in `out`: `OUT/<recipe>` for each recipe, and every perplexity in `OUT/compare.json`. A later
    call takes from there what was made and measured on the same model, text and settings.

    Args:
      model_name: what `load` takes, not yet quantised.
      entries: recipes to quantise by; paths of folders already quantised are rows as they are.
      out: folder for the quantised models and the figures.
      corpus: whose evaluation text is scored.
      seq_len: tokens in a window of it.
      max_windows: score only the first so many.
      batch_size: windows scored at a time.
      activation_bits: bits of the linear inputs to score at, 16 for none.
      plot: image to draw perplexity against bytes in; its ending says the format.
      dtype: what the models compute in.
      progress: phases and bars on stderr.
    Returns:
      JSON-ready figures: `rows`, each with `name`, `bits_per_weight_linear`, `bits_per_weight_model`, `bytes` (all
      tensors of the model), `perplexity` by bits and `seconds` of quantising; of a mix also `domains`, the perplexities
      of its texts by bits, and `worst`, the `domain` with the highest `ratio` to full precision; `corpus`, `windows`,
      `seq_len`, `calibration` and versions.
    Raises:
      TwlaError: an input that cannot be used, or a folder in `out` that was made otherwise.
    """
    out = Path(out)
    if plot:
        plotting.require_place(plot)
    path = loading.resolve_model(model_name)
    if checkpoint.is_checkpoint(path):
        raise TwlaError(f"{path}: is quantised already; compare starts from the original")
    check_length(seq_len, readers.read_config(path))
    text = corpora.load_corpus(corpus, "evaluation")
    source = loading.describe_model(path)["sha256"]
    names = [_name(entry) for entry in entries]
    for entry in entries:
        if isinstance(entry, Recipe):
            places.check_name(entry.name)
            if entry.name.lower() == RESULTS:
                raise TwlaError(f"recipe name '{entry.name}': is the name of the file with the figures")
    if twice := {name for name in names if names.count(name) > 1}:
        raise TwlaError(f"two rows are called {', '.join(sorted(twice))}")
    for entry in entries:
        if isinstance(entry, Recipe) and (out / entry.name).exists():
            _check_reusable(out / entry.name, entry, source)
            # A kill once the folder was whole left its finished parts, or some of them under a hidden name.
            with locks.hold(out / entry.name):
                folders.discard_work(out / f"{entry.name}{quantize_model.WORK}", out / entry.name)
    out.mkdir(parents=True, exist_ok=True)
    phases = Phases(verbose=progress)
    measured = Measured(out / RESULTS)
    settings = {"seq_len": seq_len, "max_windows": max_windows, "batch_size": batch_size}
    score = Scorer(measured, text, dtype, settings, phases, progress)
    rows = [_full_precision(path, source, score)]
    for name, entry in zip(names, entries, strict=True):
        folder = entry if isinstance(entry, Path) else out / name
        if isinstance(entry, Recipe) and not folder.exists():
            with phases(f"{name}: quantise"):
                checks = {"check_corpus": corpus, "check_windows": 1, "allow_broken": True}
                quantize_model.quantize_to_folder(
                    path, folder, entry, dtype=dtype, progress=progress, **checks
                )
        rows.append(_quantized(name, folder, score, activation_bits))
    _add_worst(rows)
    result = {
        **environment(),
        "model": {"name": path.name, "sha256": source},
        "corpus": text.describe(),
        "windows": rows[0]["windows"],
        "seq_len": seq_len,
        "dtype": dtype,
        "rows": rows,
        "seconds": phases.seconds,
    }
    if plot:
        plotting.plot_comparison(plot, result)
    return result


def format_comparison(result: Mapping[str, Any]) -> str:
    """Return the rows as a table for a person."""
    columns = list(dict.fromkeys(bits for row in result["rows"] for bits in row["perplexity"]))
    worst = list(dict.fromkeys(bits for row in result["rows"] for bits in row.get("worst", {})))
    width = max(len(row["name"]) for row in result["rows"])
    lines = [
        f"{result['model']['name']}: perplexity on {result['corpus']['name']}, {result['windows']} windows of"
        f" {result['seq_len']}",
        "",
        f"{'':{width}}{'bits/weight':>13}{'whole model':>13}{'bytes':>15}"
        + "".join(f"{bits:>10}" for bits in columns)
        + "".join(f"{'worst ' + bits:>20}" for bits in worst),
    ]
    for row in result["rows"]:
        scores = (row["perplexity"].get(bits) for bits in columns)
        lines.append(
            f"{row['name']:{width}}{row['bits_per_weight_linear']:13.3f}{row['bits_per_weight_model']:13.3f}"
            f"{row['bytes']:15,}"
            + "".join(f"{'' if s is None else f'{s:.2f}':>10}" for s in scores)
            + "".join(f"{_ratio(row['worst'].get(bits)):>20}" for bits in worst)
        )
    return "\n".join(lines)


def _ratio(worst: Mapping[str, Any] | None) -> str:
    return "" if worst is None else f"{worst['domain']} {worst['ratio']:.2f}×"


def _add_worst(rows: list[dict[str, Any]]) -> None:
    """Add to rows that were scored by domain the worst ratio to the first row's perplexities, by bits."""
    original = rows[0]["domains"].get(f"A{OFF}", {})
    for row in rows:
        row["worst"] = {}
        for bits, found in row["domains"].items():
            ratios = {name: value / original[name] for name, value in found.items()}
            # One that is no number is the worst there can be.
            worst = max(ratios, key=lambda name: math.inf if math.isnan(ratios[name]) else ratios[name])
            row["worst"][bits] = {"domain": worst, "ratio": ratios[worst]}


def _by_bits(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "perplexity": {bits: scored["perplexity"] for bits, scored in scores.items()},
        "domains": {bits: scored["domains"] for bits, scored in scores.items() if "domains" in scored},
    }


def _full_precision(path: Path, source: Any, score: Scorer) -> dict[str, Any]:
    shapes = jax.tree.leaves(readers.read_model(path, dtype=jnp.float16)[0])
    weights, size = sum(leaf.size for leaf in shapes), sum(leaf.nbytes for leaf in shapes)
    scores = score("full precision", source, path, [OFF])
    return {
        "name": "full precision",
        "bits_per_weight_linear": 16.0,
        "bits_per_weight_model": 8 * size / weights,
        "bytes": size,
        **_by_bits(scores),
        "windows": scores[f"A{OFF}"]["windows"],
        "seconds": None,
    }


def _quantized(name: str, folder: Path, score: Scorer, bits: Sequence[int]) -> dict[str, Any]:
    account, manifest = accounting.account(folder), checkpoint.read_manifest(folder)
    scores = score(name, manifest["checksum"], folder, bits)
    return {
        "name": name,
        "bits_per_weight_linear": account["bits_per_weight_linear"],
        "bits_per_weight_model": account["bits_per_weight_model"],
        "bytes": sum(account["breakdown"].values()) - account["breakdown"]["tokenizer_and_metadata"],
        **_by_bits(scores),
        "windows": next(iter(scores.values()))["windows"],
        "seconds": _report(folder).get("seconds", {}).get("quantise"),
    }


def _check_reusable(folder: Path, recipe: Recipe, source: Any) -> None:
    """Refuse a folder in OUT that the recipe did not make of this model and text."""
    made = Recipe.from_dict(checkpoint.read_manifest(folder)["recipe"], source=str(folder))
    report, corpus = _report(folder), recipe.calibration.corpus
    same = report.get("model", {}).get("sha256") == source
    if corpus != corpora.SELF:  # a sample of the model follows from model and recipe
        text = corpora.load_corpus(corpus, "calibration")
        same = same and report.get("calibration", {}).get("sha256") == text.sha256
    if made != recipe or not same:
        raise TwlaError(
            f"{folder}: was made from another model, text or recipe; remove it or choose another --out"
        )


def _report(folder: Path) -> dict[str, Any]:
    report = checkpoint.read_report(folder)
    check_values(report, _REPORT, str(folder / checkpoint.REPORT))
    return report


def _name(entry: Recipe | Path) -> str:
    return entry.name if isinstance(entry, Recipe) else entry.name or str(entry)
