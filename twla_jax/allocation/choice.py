"""Runs ILA-AMP on a model: measures the table, chooses bits under a budget, checks them on held-out text.

Held-out text is calibration text that the model was not calibrated on, as far as there is enough of it. Every choice is
made on it and none on text for evaluation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Int

from twla_jax.allocation.measurement import Measured, held_out_loss, prepare
from twla_jax.allocation.refit import refit_clips
from twla_jax.core import ila_amp
from twla_jax.models import sites
from twla_jax.models.decoder import Decoder
from twla_jax.recipe import Recipe
from twla_jax.storage import resume
from twla_jax.text import recipe_windows
from twla_jax.text.recipe_windows import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The ways to spend a budget that are compared; of equal ones the first is taken.
METHODS = ("joint", "independent", "uniform")


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
    clips = {"refitted": held_out_loss(refitted, measured.held_out, measured.mesh), "as_fitted": losses[best]}
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
        method: held_out_loss(_at(measured, bits), measured.held_out, measured.mesh)
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


def _least(losses: Mapping[str, float]) -> str:
    """Return the name of the least loss; of equal ones the first, and none that is not a number."""
    return min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
