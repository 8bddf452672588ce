"""Allocates activation bits in a quantised folder, and shows the result to a person."""

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from twla_jax import json_files, schema
from twla_jax.allocation.choice import METHODS, choose, frontier
from twla_jax.allocation.measurement import LOSS_TOKENS, prepare
from twla_jax.core import ila_amp
from twla_jax.core.ila_amp import SensitivityTable
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import evaluate, perplexity
from twla_jax.jobs import places
from twla_jax.recipe import AllocationSettings, Recipe
from twla_jax.reports import plotting
from twla_jax.reports.run import Phases
from twla_jax.storage import checkpoint, folders
from twla_jax.text import corpora, recipe_windows, sampled
from twla_jax.text.corpora import Corpus
from twla_jax.text.sampled import SampledText

TABLES = "ila_amp.json"
_ROWS = schema.sequence(schema.sequence(schema.number(0, 1), longest=4, shortest=4), longest=10**4)
WORK = ".allocate"  # ending of the folder beside OUT that keeps what is measured


@places.writes(work=WORK, changes_saved=True)
def allocate_folder(
    out: str | Path,
    settings: AllocationSettings,
    *,
    corpus: str | None = None,
    budgets: Sequence[float] = (),
    check_corpus: str | None = None,
    max_windows: int | None = None,
    plot: str | Path | None = None,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Rewrite the activation settings of a folder that `quantize` wrote; its weights stay the files they are.

    Args:
      out: the folder.
      settings: with a budget of 0, the bits stay as they are and only the frontier is measured.
      corpus: calibration text; None takes that which the folder's model was calibrated on.
      budgets: what the frontier is measured at; empty for none.
      check_corpus: whose evaluation text gives the frontier's perplexities; None for none.
      max_windows: windows of that text; None for all.
      plot: image file of the table and the choice; needs a budget.
      dtype: what the model computes in.
      mesh: with axes `data`, over which windows are split, and `model`; None runs on one device.
      progress: phases and bars on stderr.
    Returns:
      JSON-ready figures, kept in `report.json`: `allocation` (see `choose`), `frontier`, and `seconds` by stage.
    Raises:
      TwlaError: an input that cannot be used. The folder is then as it was before.
    """
    out, phases = Path(out), Phases(verbose=progress)
    for budget in budgets:
        ila_amp.check_budget(budget, settings.choices)
    if plot is not None:
        plotting.require_place(plot)
    with phases("read the model"):
        model, tokenizer, info = checkpoint.load(out, mesh=mesh, dtype=jnp.dtype(dtype))
        text = _load_text(out, corpus or info.recipe.calibration.corpus, info.recipe)
        check = corpora.load_corpus(check_corpus, "evaluation") if check_corpus else None
        tables = read_tables(out / TABLES) if (out / TABLES).is_file() else None
    recipe = dataclasses.replace(info.recipe, allocation=settings)
    work_dir = out.with_name(out.name + WORK)
    with phases("measure the table"):
        drawn = recipe_windows.draw(text, recipe, tokenizer, model.config.vocab_size)
        measured = prepare(
            model, drawn, recipe, tables=tables, work_dir=work_dir, mesh=mesh, progress=progress
        )
    result: dict[str, Any] = {}
    if settings.budget:
        with phases("choose bits"):
            model, result["allocation"] = choose(measured, progress=progress)
    if budgets:
        score = None
        if check is not None:
            tokens = corpora.tokenize(check, tokenizer, model.config.vocab_size)
            score = functools.partial(
                evaluate,
                tokens=tokens,
                seq_len=measured.held_out.shape[1],
                max_windows=max_windows,
                batch_size=max(1, LOSS_TOKENS // measured.held_out.shape[1]),
                mesh=mesh,
                progress=progress,
            )
        with phases("measure the frontier"):
            result["frontier"] = frontier(measured, budgets, score)
    if plot is not None and settings.budget:
        plotting.plot_allocation(plot, measured.table, result["allocation"])
    with phases("save"):
        checkpoint.revise(
            out,
            model,
            recipe if settings.budget else info.recipe,
            {**info.report, **result},
            {TABLES: dump_tables(measured.tables)},
        )
        folders.discard_work(work_dir, out)
    return {**result, "seconds": phases.seconds}


def read_tables(path: Path) -> dict[str, Any]:
    """Return the contents of a folder's `ila_amp.json`.

    Raises:
      TwlaError: it holds something else.
    """
    tables = json_files.read_json(path)
    wanted = {
        "clips": schema.mapping(_ROWS),
        "tables": schema.mapping(schema.record(fingerprint=schema.text(64))),
    }
    schema.check_values({"clips": None, "tables": None, **tables}, wanted, str(path))
    try:
        for entry in tables["tables"].values():
            SensitivityTable.from_dict(entry["table"])
    except (KeyError, TypeError, ValueError):
        raise TwlaError(f"{path}: holds no sensitivity table; remove it to measure anew") from None
    return tables


def dump_tables(tables: Mapping[str, Any]) -> str:
    """Return the text of a folder's `ila_amp.json`."""
    return json.dumps(tables) + "\n"


def format_result(result: Mapping[str, Any]) -> str:
    """Return the figures of `allocate_folder`, or such a part of a report, as lines of text for a person."""
    parts = []
    if "allocation" in result:
        parts.append(_format_choice(result["allocation"]))
    if "frontier" in result:
        parts.append(_format_frontier(result["frontier"]))
    return "\n\n".join(parts)


def _format_choice(result: Mapping[str, Any]) -> str:
    before, after, table = result["before"], result["after"], result["table"]
    losses = "   ".join(
        f"{method} {result['losses'][method]:.4f} (predicted {result['predicted'][method]:.4f})"
        for method in reversed(METHODS)
    )
    spent = "taken from the folder" if table["reused"] else f"{table['seconds']:.0f} s"
    share = table["block_evaluations"] / table["naive_block_evaluations"]
    lines = [
        f"activation bits   {before['average_bits']:.3f} → {after['average_bits']:.3f} on average"
        f" (budget {result['budget']:g}, by {result['site']}, weighted by {result['weighting']})",
        f"held-out loss     {before['loss']:.4f} → {after['loss']:.4f}"
        f"   perplexity {perplexity(before['loss']):.2f} → {perplexity(after['loss']):.2f}",
        f"allocations       {losses}   chosen: {result['chosen']}",
        f"clips             as fitted {result['clips']['as_fitted']:.4f}   refitted"
        f" {result['clips']['refitted']:.4f}   kept: {result['clips']['kept'].replace('_', ' ')}",
        f"table             {table['loss_evaluations']} losses, {table['block_evaluations']:.0f} block runs"
        f" ({share:.3f} of {table['naive_block_evaluations']}), {spent}",
        "",
    ]
    for site, bits in result["bits"].items():
        counts = collections.Counter(bits)
        lines.append(f"  {site:6}" + "".join(f"{counts[b]:6} at {b}" for b in result["choices"]))
    return "\n".join(lines)


def _format_frontier(points: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'budget':>8}{'bits':>8}{'held-out loss':>16}{'perplexity':>13}   allocation"]
    for point in points:
        scored = "" if point["perplexity"] is None else f"{point['perplexity']:.2f}"
        source = point["chosen"]
        if point["from_budget"] != point["budget"]:
            source += f" of budget {point['from_budget']:g}"
        lines.append(
            f"{point['budget']:8g}{point['average_bits']:8.3f}{point['loss']:16.4f}{scored:>13}   {source}"
        )
    return "\n".join(lines)


def _load_text(out: Path, name: str, recipe: Recipe) -> Corpus | SampledText:
    if name == corpora.SELF:
        return sampled.read(out, recipe.calibration)
    return corpora.load_corpus(name, "calibration")
