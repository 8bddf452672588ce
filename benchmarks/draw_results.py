"""Draws the first table of docs/results.md, perplexity against bits: `draw_results.py docs/results.md compare.png`.

So the picture shows the figures of the table and no others; each is measured by the commands below the table. Rows
above `--most` are left out, and named below the picture. Needs the extra `plot`.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from twla_jax.reports import plotting

OTHERS = {"GPTQ": "#ef8a62", "gptq": "#ef8a62", "rtn": "#7f7f7f", "TWLA": "#b2182b"}
OURS = "#2166ac"


def rows_of(page: str) -> list[tuple[str, str, float]]:
    """Returns name, bits a weight and perplexity at A16 of every row of a page's first table."""
    table = re.search(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert table, "there is no table"
    cells = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table[0].splitlines()[2:]]
    return [(name.replace("`", ""), bits, float(score.replace(" ", ""))) for name, bits, score, *_ in cells]


def draw(path: Path, rows: list[tuple[str, str, float]], most: float) -> None:
    """Writes the picture; the first row is a line, as full precision, and a range of bits is a bar."""
    figure = plotting.new_figure(10, 6.5)
    axes: Any = figure.subplots()
    (name, _, score), *others = rows
    axes.axhline(score, color="black", linewidth=1)
    axes.annotate(f"{name}, {score:g}", (4.95, score), (0, 4), **_text("right"))
    shown = [row for row in others if row[2] <= most]
    for name, bits, score in shown:
        low, high = _range(bits)
        colour = next((colour for word, colour in OTHERS.items() if name.startswith(word)), OURS)
        axes.plot([low, high], [score, score], "-o", color=colour)
        right = low > 2.6 and "PyTorch" not in name  # so that no two names meet
        place = (low, score) if right else (high, score)
        axes.annotate(
            f"{name}, {score:g}", place, (-7 if right else 7, -3), **_text("right" if right else "left")
        )
    axes.set(
        yscale="log", xlabel="bits a weight of the linears, scales and rotations counted", ylabel="perplexity"
    )
    axes.set(title="SmolLM2-135M-Instruct on WikiText-2, activations of 16 bits", xlim=(1.6, 5))
    ticks = (20, 30, 50, 100, 200, 400)
    axes.set_yticks(ticks, list(map(str, ticks)), minor=False)
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", linewidth=0.3)
    figure.savefig(path, dpi=120)
    left_out = [name for name, _, score in others if score > most]
    print(f"{path}: {len(shown)} rows; above {most:g}: {', '.join(left_out)}")


def _text(side: str) -> dict[str, Any]:
    return {"textcoords": "offset points", "fontsize": 9, "horizontalalignment": side}


def _range(bits: str) -> tuple[float, float]:
    found = [float(each) for each in re.findall(r"\d+\.?\d*", bits)]
    return found[0], found[-1]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--most", type=float, default=500, help="the highest perplexity that is drawn")
    options = parser.parse_args()
    draw(options.image, rows_of(options.page.read_text(encoding="utf-8")), options.most)


if __name__ == "__main__":
    main()
