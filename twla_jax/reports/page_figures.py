"""Draws the figures of a report's page as SVG that takes its text colour from the page around it."""

import functools
import importlib
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from twla_jax.core.ila_amp import SensitivityTable
from twla_jax.reports import plotting

_SIZE = (5.2, 3.0)  # inches; at 9 points the text can still be read on a phone
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "twla",  # the same figures give the same page
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_MANY = 16  # blocks of which a heat map names the bits
# The figure's size, which the page chooses; numbered ids, which several figures share; a note of the writer.
_UNWANTED = (
    re.compile(r'(?<=pt") height="[^"]*"|(?<=<svg xmlns:xlink="http://www.w3.org/1999/xlink") width="[^"]*"'),
    re.compile(r' id="[a-z0-9A-Z.]+_\d+"'),
    re.compile(r"<metadata>.*?</metadata>", re.DOTALL),
)
_COLOURS = ("#8a99b8", "#3b8fc2", "#dd6031", "#4f9d69", "#a377c4", "#c29200", "#d1495b", "#159aa6")


def by_layer(values: Mapping[str, Sequence[float]], label: str) -> str:
    """Return one line a site over the blocks, on a logarithmic axis."""
    return _svg(functools.partial(_draw_layers, values, label))


def before_and_after(values: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str) -> str:
    """Return two lines a site over the blocks, the first of them dashed."""
    return _svg(functools.partial(_draw_changes, values, label))


def densities(edges: Sequence[float], values: Mapping[str, Sequence[float]]) -> str:
    """Return histograms with common bins, the first filled, the others as lines."""
    return _svg(functools.partial(_draw_densities, edges, values), height=2.4)


def bars(values: Mapping[str, float], label: str, *, line: float | None = None, form: str = "{:.2f}") -> str:
    """Return horizontal bars in the order given; `line` marks a value on their axis."""
    return _svg(functools.partial(_draw_bars, values, label, line, form), height=0.9 + 0.28 * len(values))


def against_bytes(points: Sequence[tuple[str, float, float]]) -> str:
    """Return perplexity over bytes, each point `(name, bytes, perplexity)` with its name."""
    return _svg(functools.partial(_draw_points, points))


def costs(table: SensitivityTable) -> str:
    """Return what fewer bits cost at each site alone."""
    return _svg(lambda axes: plotting.draw_costs(axes, table))


def interactions(table: SensitivityTable) -> str:
    """Return what fewer bits at neighbours cost together beyond that."""
    return _svg(functools.partial(_draw_interactions, table))


def bits(allocation: Mapping[str, Any]) -> str:
    """Return the bits chosen, a row a site."""
    layers = len(next(iter(allocation["bits"].values())))
    return _svg(lambda axes: plotting.draw_bits(axes, allocation, numbers=layers <= _MANY))


def losses(allocation: Mapping[str, Any]) -> str:
    """Return the held-out loss of each way to allocate bits."""
    return _svg(lambda axes: plotting.draw_losses(axes, allocation))


def _draw_layers(values: Mapping[str, Sequence[float]], label: str, axes: Any) -> None:
    axes.set_yscale("log")
    for row, colour in zip(values.values(), itertools.cycle(_COLOURS)):
        axes.plot(row, marker=".", color=colour)
    _over_blocks(axes, axes.lines, list(values), label)


def _draw_changes(values: Mapping[str, Any], label: str, axes: Any) -> None:
    for (before, after), colour in zip(values.values(), itertools.cycle(_COLOURS)):
        axes.plot(before, "--", color=colour, alpha=0.6)
        axes.plot(after, "-", color=colour)
    _over_blocks(axes, axes.lines[1::2], list(values), label, " (dashed: before)")


def _over_blocks(axes: Any, lines: Any, names: list[str], label: str, more: str = "") -> None:
    axes.set(xlabel=f"block{more}", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(lines, names)


def _draw_densities(edges: Sequence[float], values: Mapping[str, Sequence[float]], axes: Any) -> None:
    for index, (name, row) in enumerate(values.items()):
        axes.stairs(row, edges, color=_COLOURS[2 * index], fill=index == 0, label=name)
    axes.set(xlabel="weight over the root mean square of its group", ylabel="density", ylim=(0, None))
    axes.legend()


def _draw_bars(values: Mapping[str, float], label: str, line: float | None, form: str, axes: Any) -> None:
    drawn = axes.barh(list(values), list(values.values()), color=_COLOURS[1])
    axes.bar_label(drawn, [form.format(value) for value in values.values()], padding=3)
    if line is not None:
        axes.axvline(line, color="#000000", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel(label)


def _draw_points(points: Sequence[tuple[str, float, float]], axes: Any) -> None:
    sizes = [size / 1e6 for _, size, _ in points]
    axes.scatter(sizes, [score for *_, score in points], color=_COLOURS[1], zorder=3)
    for index, ((name, _, score), size) in enumerate(zip(points, sizes, strict=True)):
        right = size > (min(sizes) + max(sizes)) / 2  # labels stay inside, and neighbours apart
        axes.annotate(
            name,
            (size, score),
            (-6 if right else 6, -11 if index % 2 else 5),
            textcoords="offset points",
            ha="right" if right else "left",
        )
    axes.set(xlabel="tensors as stored, MB", ylabel="perplexity", yscale="log")
    axes.margins(x=0.1, y=0.2)
    plain = importlib.import_module("matplotlib.ticker").LogFormatter(minor_thresholds=(2, 0.5))
    axes.yaxis.set(major_formatter=plain, minor_formatter=plain)


def _draw_interactions(table: SensitivityTable, axes: Any) -> None:
    plotting.draw_interactions(axes, axes.figure, table)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _svg(draw: Any, height: float = _SIZE[1]) -> str:
    """Return a figure as an `<svg>` element without a size of its own; black is the colour of the text around it."""
    matplotlib = plotting.require_matplotlib()
    written = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = plotting.new_figure(_SIZE[0], height)
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor("none")
        draw(axes)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in _UNWANTED:
        svg = unwanted.sub("", svg)
    return svg.replace("#000000", "currentColor")
