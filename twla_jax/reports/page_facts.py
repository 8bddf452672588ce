"""Defines what a report's page is made from: figures from files, checked, and sections ready to be laid out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from twla_jax import schema
from twla_jax.core.ila_amp import SensitivityTable

_SCORES = schema.mapping(schema.optional(schema.number(0, 1e308)))
_NUMBER = schema.number(-1e308, 1e308)
_SITE = schema.record(
    layer=schema.integer(0, 10**5), site=schema.text(100), output_error=_NUMBER, weight_error=_NUMBER
)
_TEXT = schema.record(
    name=schema.text(),
    **dict.fromkeys(("perplexity", "original_perplexity", "ratio"), schema.number(0, 1e308)),
)
# What the page reads of `report.json`; what is not there is left out, what is there must be of its kind.
REPORT = {
    "model": schema.record(name=schema.text()),
    "evaluation": schema.record(perplexity=_SCORES, name=schema.text()),
    "layers": schema.optional(schema.record(sites=schema.sequence(_SITE, longest=10**6))),
    "allocation": schema.record(
        bits=schema.mapping(schema.sequence(schema.integer(2, 16), longest=10**5, shortest=1)),
        site=schema.text(100),
        losses=schema.record(**dict.fromkeys(("base", "uniform", "independent", "joint"), _NUMBER)),
        clips=schema.record(refitted=_NUMBER),
        choices=schema.sequence(schema.integer(2, 16), longest=4, shortest=2),
        budget=_NUMBER,
        after=schema.record(average_bits=_NUMBER),
    ),
    "seconds": schema.mapping(_NUMBER),
}
EVALUATION = {"by_domain": schema.mapping(), "sample": schema.text(10**6)}
# Of figures that `twla eval --domains` and `twla compare` print.
DOMAINS = schema.sequence(_TEXT, longest=1000, shortest=1)
RECIPES = schema.sequence(
    schema.record(name=schema.text(), bytes=schema.number(0, 1e18), perplexity=_SCORES),
    longest=1000,
    shortest=1,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Holds what a page is made from; what is None or empty leaves its sections out.

    Attributes:
      name: of the folder.
      recipe: the name of its recipe.
      report: of `report.json`, checked by `REPORT`.
      account: of `accounting.account`.
      table: costs and interactions of the last allocation.
      domains: rows of an evaluation by text.
      recipes: rows of a comparison, the first of them the original.
      original: weights, inputs and samples of the original and of this model, from `beside_original`.
    """

    name: str
    recipe: str
    report: Mapping[str, Any]
    account: Mapping[str, Any]
    table: SensitivityTable | None = None
    domains: Sequence[Mapping[str, Any]] = ()
    recipes: Sequence[Mapping[str, Any]] = ()
    original: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Holds one part of the page.

    Attributes:
      text: a sentence or two above the figures.
      figures: SVG elements by their captions.
      head: of the table below them.
      rows: of that table.
      samples: texts by who wrote them.
    """

    text: str = ""
    figures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    samples: Mapping[str, str] = dataclasses.field(default_factory=dict)
