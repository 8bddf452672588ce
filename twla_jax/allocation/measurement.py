"""Measures what an allocation is chosen by: held-out windows, and the table of losses at fewer bits."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from twla_jax.allocation import sensitivity
from twla_jax.core import ila_amp
from twla_jax.core.ila_amp import SensitivityTable
from twla_jax.errors import TwlaError
from twla_jax.evaluation.scoring import evaluate
from twla_jax.models import sharding, sites
from twla_jax.models.arguments import require_model, require_settings
from twla_jax.models.config import check_length
from twla_jax.models.decoder import Decoder
from twla_jax.recipe import Recipe
from twla_jax.text.recipe_windows import DrawnText

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
    before = {"average_bits": average, "loss": held_out_loss(model, held_out, mesh)}

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


def held_out_loss(model: Decoder, windows: Int32[np.ndarray, "w t"], mesh: jax.sharding.Mesh | None) -> float:
    """Return the model's loss on held-out windows, in nats a token."""
    batch_size = max(1, min(len(windows), LOSS_TOKENS // windows.shape[1]))
    return float(evaluate(model, windows, batch_size=batch_size, mesh=mesh, progress=False)["nll"])
