"""Defines the command that draws what is known about a quantised model: `report`."""

from pathlib import Path
from typing import Annotated

import tyro

from twla_jax.cli.options import Out, argument, read_text, show

Page = Annotated[tyro.conf.Positional[str | None], argument("DEST.html", optional=True)]


def report(
    out: Out,
    dest: Page = None,
    /,
    *,
    against: Annotated[str | None, argument("MODEL", optional=True)] = None,
    figures: Annotated[str | None, argument("FILE,…", optional=True)] = None,
    prompt: Annotated[str, argument("TEXT")] = "Once upon a time",
    corpus: Annotated[str, argument("CORPUS|FILE")] = "pydoc",
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write one HTML page about a quantised model: quality, errors, bytes, bits and samples.

    The page needs no other file and no network. Sections whose figures are not there are left out. Needs the extra
    plot.

    Args:
        out: folder written by twla
        dest: file to write; default: OUT.html
        against: the original; adds its weights and inputs before and after rotation, and its samples
        figures: files with what twla eval --domains --json or twla compare --json printed, with commas between them
        prompt: text that both models continue; needs --against
        corpus: text that the inputs before and after rotation are measured on; needs --against
        overwrite: replace DEST.html
        json: print what was written as JSON
    """
    from twla_jax.jobs import write_report

    result = write_report.write_report(
        out,
        dest,
        against=against,
        figures=[Path(name) for name in figures.split(",")] if figures else (),
        prompt=read_text(prompt, "--prompt"),
        corpus=corpus,
        overwrite=overwrite,
    )
    show(result, json, lambda: write_report.format_written(result))
