"""Writes the page about a quantised folder: gathers what the folder and other figures hold, and renders it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twla_jax import json_files, schema
from twla_jax.core.ila_amp import SensitivityTable
from twla_jax.errors import TwlaError
from twla_jax.jobs import allocate_bits, beside_original, loading
from twla_jax.reports import page, page_facts, plotting
from twla_jax.storage import accounting, checkpoint, locks, places, whole_files

_WANTED = {"domains": page_facts.DOMAINS, "rows": page_facts.RECIPES}


def write_report(
    out: str | Path,
    dest: str | Path | None = None,
    *,
    against: str | Path | None = None,
    figures: Sequence[str | Path] = (),
    prompt: str = "Once upon a time",
    corpus: str = "pydoc",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one HTML page about a quantised model, which needs no other file and no network.

    Args:
      out: folder that `twla quantize` wrote.
      dest: file to write; None takes `OUT.html`.
      against: the original, for the sections that need its weights.
      figures: files with what `twla eval --domains --json` or `twla compare --json` printed.
      prompt: text that the model and the original continue.
      corpus: text whose tokens the inputs before and after rotation are of.
      overwrite: replace a file in `dest`.
    Returns:
      `dest`, `bytes`, the titles of `sections`, and why others are `left_out`, by title.
    Raises:
      TwlaError: `out` holds no quantised model or a report with wrong values, `dest` is taken, matplotlib is missing,
        or `figures` are of another kind.
    """
    plotting.require_matplotlib()
    out = places.expand(out)
    manifest = checkpoint.read_manifest(out)
    place = places.resolve_place(dest if dest is not None else f"{out}.html")
    _require_free(place, dest, out, overwrite)
    given: dict[str, Any] = {}
    for path in figures:
        given |= _read_figures(Path(path))
    report = checkpoint.read_report(out)
    schema.check_values(report, page_facts.REPORT, str(out / checkpoint.REPORT))
    schema.check_values(report.get("evaluation", {}), page_facts.EVALUATION, str(out / checkpoint.REPORT))
    with locks.hold(place):
        facts = page_facts.Facts(
            name=out.resolve().name,
            recipe=str(manifest["recipe"].get("name", "")),
            report=report,
            account=accounting.account(out),
            table=_table(out, report),
            domains=given.get("domains", ()),
            recipes=given.get("rows", ()),
            original=_original(out, against, prompt, corpus) if against is not None else None,
        )
        text, sections, left_out = page.render(facts)
        with whole_files.beside(place) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return {
        "dest": str(place),
        "bytes": place.stat().st_size,
        "sections": sections,
        "left_out": left_out,
    }


def _require_free(place: Path, dest: str | Path | None, out: Path, overwrite: bool) -> None:
    if place.absolute().resolve().is_relative_to(out.resolve()):
        raise TwlaError(f"{dest}: lies in {out} itself; name a place outside")
    if place.is_dir() or not place.absolute().parent.is_dir():
        raise TwlaError(f"{place}: cannot be written, its folder is missing or it is one itself")
    if place.exists() and not overwrite:
        raise TwlaError(f"{place}: exists; give --overwrite or another name")


def _read_figures(path: Path) -> dict[str, Any]:
    content = json_files.read_json(path)
    held = {key: content[key] for key in _WANTED if key in content}
    if not held:
        raise TwlaError(
            f"{path}: holds neither what twla eval --domains --json nor twla compare --json prints"
        )
    schema.check_values(held, _WANTED, str(path))
    return held


def _table(out: Path, report: dict[str, Any]) -> SensitivityTable | None:
    """Return the table that the last allocation was made from."""
    if "allocation" not in report or not (out / allocate_bits.TABLES).is_file():
        return None
    held = allocate_bits.read_tables(out / allocate_bits.TABLES).get("tables", {})
    entry = held.get(report["allocation"].get("site"))
    return None if entry is None else SensitivityTable.from_dict(entry["table"])


def _original(out: Path, against: str | Path, prompt: str, corpus: str) -> dict[str, Any]:
    quantized, tokenizer = loading.load(out)
    if checkpoint.is_checkpoint(loading.resolve_model(against)):
        raise TwlaError(f"{against}: is quantised; give the original")
    original, _ = loading.load(against)
    if tokenizer is None:
        raise TwlaError(f"{out}: has no tokenizer")
    return beside_original.beside_original(quantized, original, tokenizer, prompt=prompt, corpus=corpus)


def format_written(result: dict[str, Any]) -> str:
    """Return what was written as lines of text for a person."""
    lines = [f"{result['dest']}: {len(result['sections'])} sections, {result['bytes']:,} bytes"]
    lines += [f"left out: {title} ({reason})" for title, reason in result["left_out"].items()]
    return "\n".join(lines)
