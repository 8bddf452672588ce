"""Checks that a refinement did good in every domain: a better mean may hide that one text was forgotten."""

import logging
import math
from typing import Any

import jax
import numpy as np

from twla_jax.evaluation.domains import evaluate_domains
from twla_jax.models import Decoder
from twla_jax.models.decoder import computing_in
from twla_jax.text.recipe_windows import DrawnText

_WINDOWS = 2  # of each domain

_log = logging.getLogger(__name__)


def domain_windows(text: DrawnText) -> dict[str, np.ndarray]:
    """Return the first calibration windows of each domain, which are not those of the end-to-end refinement.

    Where the text is no mix, there are none.
    """
    count = len(text.domains)
    windows = {
        name: text.calibration[index : _WINDOWS * count : count] for index, name in enumerate(text.domains)
    }
    return {name: rows for name, rows in windows.items() if len(rows)}


def better_by_domain(
    before: Decoder,
    after: Decoder,
    teacher: Decoder,
    texts: dict[str, np.ndarray],
    dtype: str,
    *,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool,
) -> tuple[Decoder, dict[str, Any]]:
    """Return the model whose worst domain is the better one, and the `worst` domain and `ratio` of both.

    A ratio that is not a number is worse than any.

    Args:
      before: the model as it was.
      after: the same, refined.
      teacher: the model that both were made from.
      texts: windows by domain.
      dtype: what is computed in.
      mesh: as `evaluate_domains` takes it.
      progress: bars on stderr.
    """
    teacher, *models = (computing_in(model, dtype, fused=True) for model in (teacher, before, after))
    worst = []
    for model in models:
        found = evaluate_domains(model, texts, original=teacher, mesh=mesh, progress=progress)
        row = found["domains"][-1]
        worst.append({"worst": row["name"], "ratio": row["ratio"]})
    figures: dict[str, Any] = {"before": worst[0], "after": worst[1]}
    if worst[1]["ratio"] <= worst[0]["ratio"] or (
        math.isnan(worst[0]["ratio"]) > math.isnan(worst[1]["ratio"])
    ):
        return after, figures
    _log.warning(
        "refinement raised the worst ratio of perplexities, that of '%s', to %.2f from %.2f of '%s': the model is left"
        " as it was; more text of that kind may help",
        *(worst[1][key] for key in ("worst", "ratio")),
        *(worst[0][key] for key in ("ratio", "worst")),
    )
    return before, figures
