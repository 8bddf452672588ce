"""Plots what was measured; this needs the extra `plot`."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twla_jax.core.ila_amp import SensitivityTable
from twla_jax.errors import TwlaError
from twla_jax.storage import locks, whole_files

_COLOURS = ("#b2182b", "#ef8a62", "#67a9cf", "#2166ac")


def require_matplotlib() -> Any:
    """Return the module matplotlib.

    Raises:
      TwlaError: it is missing; says what to install.
    """
    try:
        return importlib.import_module("matplotlib")
    except ImportError:
        raise TwlaError("a figure needs matplotlib: pip install 'twla-jax[plot]'") from None


def require_place(path: str | Path) -> None:
    """Refuse an image file that could not be written when the work is done.

    Raises:
      TwlaError: matplotlib is missing or knows no such kind of image, or there is no such folder.
    """
    require_matplotlib()
    path = Path(path)
    kinds = ("png", "pdf", "svg", "jpg", "jpeg", "webp", "ps", "eps", "tif", "tiff")
    if path.suffix and path.suffix.lower()[1:] not in kinds:
        raise TwlaError(f"{path}: no image is written as {path.suffix}; take .png, .pdf or .svg")
    if path.is_dir() or not path.parent.is_dir():
        raise TwlaError(f"{path}: cannot be written, its folder is missing or it is one itself")


def plot_allocation(path: str | Path, table: SensitivityTable, result: Mapping[str, Any]) -> None:
    """Draw the table and the choice made from it: C as bars, K as a heat map, the bits, the losses of each method.

    Args:
      path: file to write; its suffix decides the format.
      table: costs and interactions of the sites.
      result: figures of the choice, from `allocation.choose`.

    Raises:
      TwlaError: matplotlib is missing, or does not know the format.
    """
    figure = new_figure(14, 9)
    (costs, interactions), (bits, losses) = figure.subplots(2, 2, width_ratios=(2.2, 1))
    draw_costs(costs, table)
    draw_interactions(interactions, figure, table)
    draw_bits(bits, result)
    draw_losses(losses, result)
    for axes in (costs, interactions, bits):
        axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def plot_comparison(path: str | Path, result: Mapping[str, Any]) -> None:
    """Draw perplexity against the bytes of the whole model, one line for each activation bit-width.

    Args:
      path: file to write; its ending says the format.
      result: what `compare_recipes.compare_recipes` returns.

    Raises:
      TwlaError: matplotlib is missing, or does not know the format.
    """
    figure = new_figure(10, 6.5)
    axes = figure.subplots()
    full, *rows = result["rows"]
    for index, bits in enumerate(dict.fromkeys(bits for row in rows for bits in row["perplexity"])):
        here = [row for row in rows if bits in row["perplexity"]]
        sizes, scores = ([row["bytes"] / 1e6 for row in here], [row["perplexity"][bits] for row in here])
        axes.scatter(sizes, scores, color=_COLOURS[-1 - index % len(_COLOURS)], label=bits, zorder=3)
        for row, size, score in zip(here, sizes, scores, strict=True):
            label = f"{row['name']}, {row['bits_per_weight_linear']:.2f} bits"
            right = size > (min(sizes) + max(sizes)) / 2  # labels stay inside
            axes.annotate(
                label,
                (size, score),
                (-6 if right else 6, -3),
                textcoords="offset points",
                fontsize=8,
                horizontalalignment="right" if right else "left",
            )
    for bits, score in full["perplexity"].items():
        axes.axhline(
            score, color="black", linewidth=1, label=f"full precision {bits}, {full['bytes'] / 1e6:.0f} MB"
        )
    axes.set_yscale("log")
    axes.margins(x=0.15)
    axes.set(
        title=f"{result['model']['name']}: {result['corpus']['name']}, {result['windows']} windows of"
        f" {result['seq_len']}; bits a weight of the linears, all in",
        xlabel="the whole model's tensors as stored, MB",
        ylabel="perplexity",
    )
    axes.legend()
    _save(figure, path)


def plot_roofline(path: str | Path, result: Mapping[str, Any]) -> None:
    """Draw operations a second over operations a byte, below the ceilings measured in the same run.

    Args:
      path: file to write; its ending says the format.
      result: what `benchmark.measure` returns.

    Raises:
      TwlaError: matplotlib is missing, or does not know the format.
    """
    figure = new_figure(9, 6)
    axes = figure.subplots()
    bandwidth, peaks = result["copy_bytes_per_second"], result["product_operations_per_second"]
    intensity = np.geomspace(0.5, 1e5, 200)
    for (kind, peak), style in zip(peaks.items(), ("--", "-"), strict=True):
        ceiling = np.minimum(intensity * bandwidth, peak)
        axes.plot(intensity, ceiling / 1e12, style, color="black", label=f"copy, and XLA's best in {kind}")
    for (label, marker), points in _roofline_points(result).items():
        x, y = np.asarray(points).T
        axes.plot(x, y / 1e12, marker, label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="tera-operations a second")
    axes.set(title=f"{result['shape']}, {result['device']['kind']}: {result['path']}")
    axes.legend()
    _save(figure, path)


def _roofline_points(result: Mapping[str, Any]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return operations a byte and operations a second of each kind of product."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def add(label, marker, work, size, microseconds):
        points.setdefault((label, marker), []).append((work / size, work / microseconds * 1e6))

    for row in result.get("kernels", []):
        if "bf16_microseconds" in row:
            work, matrix = row["operations"], row["rows"] * row["columns"]
            name, kind = row["name"].split(", ")[0], row["name"].split(", ")[-1]
            weights = "integers" if name.startswith("head") else "ternary"
            add(f"{kind} × {weights}, few tokens", "o", work, row["bytes"], row["microseconds"])
            add("XLA bf16, few tokens", "x", work, 2 * matrix, row["bf16_microseconds"])
    for row in result.get("prefill", []):
        if n := row["rows"]:
            m, t, work = row["columns"], row["tokens"], row["operations"]
            add("int8 × ternary, many tokens", "s", work, row["bytes"], row["microseconds"])
            add("XLA bf16, many tokens", "+", work, 2 * (n * m + t * (m + n)), row["bf16_microseconds"])
            add("XLA int8, many tokens", "1", work, n * m + t * (m + 4 * n), row["int8_microseconds"])
    return points


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches."""
    require_matplotlib()
    return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path) -> None:
    """Write an image that appears whole or not at all; without an ending it gets `.png`. A link is followed."""
    place = Path(os.path.realpath(path))
    place = place if place.suffix else place.with_name(f"{place.name}.png")
    with locks.hold(place), whole_files.beside(place) as temporary:
        try:
            figure.savefig(temporary, dpi=150, format=place.suffix[1:].lower())
        except ValueError as error:
            raise TwlaError(f"{path}: {error}") from None


def draw_costs(axes: Any, table: SensitivityTable) -> None:
    """Draw C: what fewer bits cost at each site alone, as bars."""
    lower = table.choices[:-1]
    width = 0.8 / len(lower)
    place = np.arange(len(table.costs))
    for index, (choice, colour) in enumerate(zip(lower, _COLOURS, strict=False)):
        axes.bar(place + index * width, table.costs[:, index], width, color=colour, label=f"{choice} bits")
    # A few sites at 2 bits cost a hundred times the rest.
    axes.set_yscale("symlog", linthresh=max(1e-4, float(np.quantile(np.abs(table.costs[:, :-1]), 0.25))))
    axes.set(title=f"C: rise of the loss over {table.choices[-1]} bits, one site alone", xlabel="site")
    axes.set_ylabel("nats per token")
    axes.legend()


def draw_interactions(axes: Any, figure: Any, table: SensitivityTable) -> None:
    """Draw K as a heat map: rows are pairs of bits, columns pairs of neighbours."""
    lower = table.choices[:-1]
    values = table.interactions[:, :-1, :-1].reshape(-1, len(lower) ** 2).T
    limit = float(np.quantile(np.abs(values), 0.98)) if values.size else 0.0
    limit = limit or 1.0
    image = axes.imshow(
        values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
    )
    axes.set_yticks(range(len(lower) ** 2), [f"{left}, {right}" for left in lower for right in lower])
    axes.set(title="K: what neighbours cost together beyond that", xlabel="left site", ylabel="bits")
    figure.colorbar(image, ax=axes, extend="both")


def draw_bits(axes: Any, result: Mapping[str, Any], *, numbers: bool = True) -> None:
    """Draw the bits chosen, a row a site and a column a block."""
    chosen = np.asarray(list(result["bits"].values()))
    axes.imshow(
        chosen,
        aspect="auto",
        cmap="viridis",
        vmin=result["choices"][0],
        vmax=result["choices"][-1],
        interpolation="nearest",
    )
    for (row, layer), value in np.ndenumerate(chosen) if numbers else ():
        axes.text(layer, row, str(value), ha="center", va="center", color="white", fontsize=8)
    axes.set_yticks(range(len(chosen)), list(result["bits"]))
    after = result["after"]["average_bits"]
    axes.set(title=f"bits chosen: {after:.2f} on average, budget {result['budget']:g}", xlabel="block")


def draw_losses(axes: Any, result: Mapping[str, Any]) -> None:
    """Draw the held-out loss of each way to allocate, and that of the most bits as a line."""
    measured = {name: result["losses"][name] for name in ("uniform", "independent", "joint")}
    measured["refitted clips"] = result["clips"]["refitted"]
    bars = axes.bar(list(measured), list(measured.values()), color=_COLOURS)
    axes.bar_label(bars, fmt="%.3f")
    base = result["losses"]["base"]
    axes.axhline(base, color="black", linewidth=1, label=f"all at {result['choices'][-1]} bits")
    low, high = min(base, *measured.values()), max(base, *measured.values())
    margin = 0.1 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.set(title="held-out loss", ylabel="nats per token")
    axes.legend()
