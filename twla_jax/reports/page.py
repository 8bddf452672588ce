"""Lays out one self-contained HTML page about a quantised model."""

import importlib.resources

import jinja2

from twla_jax.reports.page_facts import Facts
from twla_jax.reports.page_sections import SECTIONS, headline

_TEMPLATE = "page.html"


def render(facts: Facts) -> tuple[str, list[str], dict[str, str]]:
    """Return the page, the titles of its sections, and why others are left out, by title.

    Raises:
      TwlaError: matplotlib is missing.
    """
    left_out = {title: why for title, (missing, _) in SECTIONS.items() if (why := missing(facts))}
    sections = {title: make(facts) for title, (_, make) in SECTIONS.items() if title not in left_out}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        facts=facts, sections=sections, left_out=left_out, headline=headline(facts)
    )
    return page, list(sections), left_out
