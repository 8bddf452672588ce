"""Runs ILA-AMP on a model: measures the table, chooses bits under a budget, checks them on held-out text.

Held-out text is calibration text that the model was not calibrated on, as far as there is enough of it. Every choice is
made on it and none on text for evaluation.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int, Int32

from twla_jax.allocation import sensitivity
from twla_jax.allocation.refit import refit_clips
from twla_jax.core import ila_amp
from twla_jax.core.ila_amp import SensitivityTable
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import evaluate
from twla_jax.models import sharding, sites
from twla_jax.models.arguments import require_model, require_settings
from twla_jax.models.config import check_length
from twla_jax.models.decoder import Decoder
from twla_jax.recipe import Recipe
from twla_jax.storage import resume
from twla_jax.text import recipe_windows
from twla_jax.text.recipe_windows import DrawnText, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The ways to spend a budget that are compared; of equal ones the first is taken.
METHODS = ("joint", "independent", "uniform")
LOSS_TOKENS = 16384  # tokens at a time when one allocation is measured or scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A quantised model and what its bits are chosen by.

    Attributes:
      model: with its clips as they were first fitted; what bits it has does not matter.
      calibration: windows that clips are refitted on.
      held_out: windows that losses are measured on.
      table: of losses at fewer bits, on `held_out`.
      figures: JSON-ready: `held_out`, `table` and `before`, the model as it came.
      tables: JSON-ready; a later `prepare` that is given them measures nothing again.
      mesh: that the model lies on, and whose axis `data` windows are split over.
    """

    model: Decoder
    recipe: Recipe
    calibration: Int32[np.ndarray, "n s"]
    held_out: Int32[np.ndarray, "w t"]
    table: SensitivityTable
    figures: dict[str, Any]
    tables: dict[str, Any]
    mesh: jax.sharding.Mesh | None = None


@resume.keeps_work_dir
def allocate_bits(
    model: Decoder,
    text: Text,
    recipe: Recipe,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    tables: Mapping[str, Any] | None = None,
    work_dir: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> tuple[Decoder, dict[str, Any], dict[str, Any]]:
    """Give each activation site of a quantised model its own bits, `recipe.allocation.budget` on average.

    Args:
      model: quantised, with fitted clips.
      text: that which the model was calibrated on, so that its windows can be avoided (see `recipe_windows.draw`).
      recipe: `allocation` says what to do, `calibration` and `refine` what the model has seen of the text, which is
        avoided, `activations` how to fit clips.
      tokenizer: of the model, where the text is a corpus.
      tables: what an earlier call returned for the same model and text; measured anew where it does not fit.
      work_dir: an interrupted measurement goes on from what it left here.
      mesh: with axes `data`, over which windows are split, and `model`.
      progress: bars with an estimate of the time left, on stderr.

    Returns:
      The same model at the chosen bits; JSON-ready figures (see `choose`); and the tables, to be given to a later call.

    Raises:
      TwlaError: a corpus for evaluation, a text shorter than a window, a model that was not quantised, no feasible
        budget, or what `sensitivity.measure` refuses.
    """
    drawn = recipe_windows.draw(text, recipe, tokenizer, model.config.vocab_size)
    measured = prepare(model, drawn, recipe, tables=tables, work_dir=work_dir, mesh=mesh, progress=progress)
    allocated, result = choose(measured, progress=progress)
    return allocated, result, measured.tables


def prepare(
    model: Decoder,
    text: DrawnText,
    recipe: Recipe,
    *,
    tables: Mapping[str, Any] | None = None,
    work_dir: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Measured:
    """Measure the sensitivity table, or take it from `tables`.

    Args:
      model: quantised, with fitted clips.
      text: its calibration and held-out windows.
      recipe: as for `allocate_bits`.
      tables: as for `allocate_bits`.
      work_dir: as for `allocate_bits`.
      mesh: as for `allocate_bits`.
      progress: bars on stderr.

    Raises:
      TwlaError: as `allocate_bits`.
    """
    require_model(model)
    require_settings(recipe, Recipe, "recipe")
    sites.require_quantizers(model)
    settings, held_out = recipe.allocation, text.held_out
    if held_out is None:
        raise TwlaError("bits are allocated on held-out windows: the text has none")
    check_length(held_out.shape[1], model.config)
    model = sharding.place(model, mesh)
    average = ila_amp.average_bits(
        sites.input_bits(model).ravel(), sites.site_weights(model, "input", settings.weighting)
    )
    before = {"average_bits": average, "loss": _loss(model, held_out, mesh)}

    # An earlier allocation may have refitted some clips; the table is of those that were fitted for every bit-width.
    if tables:
        model = sites.with_input_clips(model, tables["clips"])
    clips = {site: values.tolist() for site, values in sites.input_clips(model).items()}
    identity = sensitivity.fingerprint(model, held_out, settings.site, settings.choices)
    known = (tables or {}).get("tables", {})
    entry = known.get(settings.site, {"fingerprint": None})
    reused = entry["fingerprint"] == identity
    if reused:
        table = SensitivityTable.from_dict(entry["table"])
    else:
        table = sensitivity.measure(
            model,
            held_out,
            settings.site,
            settings.choices,
            work_dir=work_dir,
            mesh=mesh,
            progress=progress,
        )
    entry = {"fingerprint": identity, "table": table.to_dict()}
    return Measured(
        model=model,
        recipe=recipe,
        calibration=text.calibration,
        held_out=held_out,
        table=table,
        figures={
            "held_out": {
                **text.description,
                "windows": len(held_out),
                "seq_len": held_out.shape[1],
                "seen_in_calibration": text.overlap,
            },
            "table": {**table.effort, "reused": reused},
            "before": before,
        },
        tables={"clips": clips, "tables": {**known, settings.site: entry}},
        mesh=mesh,
    )


def choose(measured: Measured, *, progress: bool = True) -> tuple[Decoder, dict[str, Any]]:
    """Return the model at the best measured allocation of the recipe's budget.

    The joint allocation, the independent one (K = 0) and the uniform one are each measured on the held-out windows, and
    the best is taken, whatever the table foretold. Then its clips are refitted, and kept where that lowers the loss.

    Returns:
      The model, and JSON-ready figures: the settings; `before` and `after` (`average_bits`, `loss`); measured `losses`
      and the `predicted` ones of each method, and which was `chosen`; the loss with `clips` as fitted and refitted;
      `bits` of every input by layer; `held_out` and `table` as in `Measured.figures`.

    Raises:
      TwlaError: a budget that the choices cannot give.
    """
    settings = measured.recipe.allocation
    options, losses = _compare(measured, settings.budget)
    best = _least(losses)
    allocated = _at(measured, options[best])
    refitted = refit_clips(
        allocated,
        measured.calibration,
        measured.recipe.activations.clips,
        measured.recipe.activations.clip_tokens,
        mesh=measured.mesh,
        progress=progress,
    )
    clips = {"refitted": _loss(refitted, measured.held_out, measured.mesh), "as_fitted": losses[best]}
    kept = _least(clips)
    if kept == "refitted":
        allocated = refitted
    bits = sites.input_bits(allocated)
    return allocated, {
        "budget": settings.budget,
        "site": settings.site,
        "choices": list(settings.choices),
        "beta": settings.beta,
        "weighting": settings.weighting,
        "before": measured.figures["before"],
        "after": {"average_bits": _average(measured, options[best]), "loss": clips[kept]},
        "losses": {"base": measured.table.base_loss, **losses},
        "predicted": {
            method: measured.table.predict(option, settings.beta) for method, option in options.items()
        },
        "chosen": best,
        "clips": {**clips, "kept": kept},
        "bits": {site.name: bits[:, column].tolist() for column, site in enumerate(measured.model.sites)},
        "held_out": measured.figures["held_out"],
        "table": measured.figures["table"],
    }


def frontier(
    measured: Measured,
    budgets: Sequence[float],
    score: Callable[[Decoder], Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Return the least held-out loss at each budget, from one table, with the clips as first fitted.

    A budget takes the best measured allocation that it or any lower budget of the list affords, so `loss` never rises
    from one budget to the next; `losses` says what was measured at the budget itself.

    Args:
      measured: what `prepare` returned.
      budgets: bits on average, each to be met.
      score: what `evaluate` says of a model on other text. Its `perplexity` is reported; nothing is chosen by it.

    Returns:
      For each budget, ascending: `budget`, `losses` by method, `chosen`, `from_budget`, `average_bits`, `loss`,
      `predicted`, `perplexity` (None without `score`).

    Raises:
      TwlaError: a budget that the choices cannot give.
    """
    points: list[dict[str, Any]] = []
    for budget in sorted(budgets):
        options, losses = _compare(measured, budget)
        chosen = _least(losses)
        point = {
            "chosen": chosen,
            "from_budget": budget,
            "average_bits": _average(measured, options[chosen]),
            "loss": losses[chosen],
            "predicted": measured.table.predict(options[chosen], measured.recipe.allocation.beta),
        }
        if points and points[-1]["loss"] <= point["loss"]:
            point = {key: points[-1][key] for key in (*point, "perplexity")}
        else:
            point["perplexity"] = score(_at(measured, options[chosen]))["perplexity"] if score else None
        points.append({"budget": budget, "losses": losses, **point})
    return points


def _compare(measured: Measured, budget: float) -> tuple[dict[str, Int[np.ndarray, " l"]], dict[str, float]]:
    """Return the allocations of a budget by every method, and their losses on the held-out windows."""
    table, settings = measured.table, measured.recipe.allocation
    weights = sites.site_weights(measured.model, settings.site, settings.weighting)
    options = {
        "joint": ila_amp.allocate(
            table.costs, table.interactions, weights, budget, table.choices, settings.beta
        ),
        "independent": ila_amp.allocate(table.costs, table.interactions, weights, budget, table.choices, 0.0),
        "uniform": ila_amp.uniform(len(weights), budget, table.choices),
    }
    return options, {
        method: _loss(_at(measured, bits), measured.held_out, measured.mesh)
        for method, bits in options.items()
    }


def _at(measured: Measured, bits: Int[np.ndarray, " l"]) -> Decoder:
    return sites.with_input_bits(
        measured.model, sites.as_inputs(measured.model, bits, measured.recipe.allocation.site)
    )


def _average(measured: Measured, bits: Int[np.ndarray, " l"]) -> float:
    settings = measured.recipe.allocation
    weights = sites.site_weights(measured.model, settings.site, settings.weighting)
    return ila_amp.average_bits(bits, weights)


def _loss(model: Decoder, windows: Int32[np.ndarray, "w t"], mesh: jax.sharding.Mesh | None) -> float:
    batch_size = max(1, min(len(windows), LOSS_TOKENS // windows.shape[1]))
    return float(evaluate(model, windows, batch_size=batch_size, mesh=mesh, progress=False)["nll"])


def _least(losses: Mapping[str, float]) -> str:
    """Return the name of the least loss; of equal ones the first, and none that is not a number."""
    return min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
