"""Measures what rotations that fold into the weights buy a model without μ: perplexity at A16 and A4, refined or not.

    TWLA_DATA=… python benchmarks/folded_rotation.py smollm2 --steps 1100

A row is printed as it is done, and the table of all last. Models and reports stay in --out: a later call skips finished
rows. On an H200 a row of SmolLM2 takes about a minute, and a refined one the time of its steps more.
"""

import argparse
import dataclasses
import time
from pathlib import Path

from twla_jax import xla_flags
from twla_jax.core.settings import FoldedRotationSettings
from twla_jax.jobs.quantize_model import quantize_to_folder
from twla_jax.recipe import Recipe, load_recipe
from twla_jax.storage import accounting, checkpoint, manifest

FOLDED = FoldedRotationSettings()
ROTATIONS = {
    "none": None,
    "stream and heads": FOLDED,
    "stream alone": dataclasses.replace(FOLDED, value_heads=False),
    "stream and heads, seed 1": dataclasses.replace(FOLDED, seed=1),
}
# What is compared, the most telling first.
ROWS = (
    *(("w1.58-sym", name) for name in ("none", "stream and heads")),
    *(("w1.58-sym-refined", name) for name in ("none", "stream and heads")),
    *(("w1.58-sym", name) for name in ("stream alone", "stream and heads, seed 1")),
)


def row_of(folder: Path) -> str:
    """Return a finished model's bits, bytes and perplexities as cells of the table."""
    size, found = accounting.account(folder), manifest.read_report(folder)["evaluation"]["perplexity"]
    cells = [f"{size['bits_per_weight_linear']:.3f}", f"{size['bytes_on_disk'] / 1e6:.1f}"]
    return " | ".join(cells + [f"{found[bits]:.2f}" for bits in ("full", "A16", "A4")])


def main() -> None:
    """Reads the command line; quantises, refines and scores every row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=1100, help="of a refinement")
    parser.add_argument("--corpus", default="wikitext2", help="evaluation text")
    parser.add_argument("--calibration", help="text; by default the recipe's")
    parser.add_argument("--windows", type=int, help="of the calibration; by default the recipe's")
    parser.add_argument("--seq-len", type=int, help="tokens in a window; by default the recipe's")
    parser.add_argument("--group-size", type=int, help="by default the recipe's")
    parser.add_argument("--check-windows", type=int, default=64, help="that the perplexity is of")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="how many rows, the most telling first")
    parser.add_argument("--out", type=Path, default=Path("folded-rotation"))
    options = parser.parse_args()
    xla_flags.disable_triton_gemm()
    table = []
    for base, rotation in ROWS[: options.rows]:
        start, recipe = time.perf_counter(), recipe_of(base, ROTATIONS[rotation], options)
        folder = options.out / f"{base} {rotation}".replace(",", "").replace(" ", "-")
        if not checkpoint.is_checkpoint(folder):
            quantize_to_folder(
                options.model,
                folder,
                recipe,
                check_corpus=options.corpus,
                check_windows=options.check_windows,
                check_bits=(16, 4),
                sample_tokens=0,
                allow_broken=True,
                progress=False,
            )
        table.append(f"| `{base}` | {rotation} | {row_of(folder)} | {time.perf_counter() - start:.0f} s |")
        print(table[-1], flush=True)
    print("\n| recipe | folded rotation | bits a weight | MB | full | A16 | A4 | time |\n|" + "---|" * 8)
    print("\n".join(table))


def recipe_of(base: str, rotation: FoldedRotationSettings | None, options: argparse.Namespace) -> Recipe:
    """Return the recipe of a row, with what the command line changes."""
    drawn = {"corpus": options.calibration, "windows": options.windows, "seq_len": options.seq_len}
    changes = {"calibration": {key: value for key, value in drawn.items() if value is not None}}
    if options.group_size is not None:
        changes["weights"] = {"group_size": options.group_size}
    recipe = load_recipe(base).updated(changes)
    if recipe.refine.end_to_end is not None:
        recipe = recipe.updated({"refine": {"end_to_end": {"steps": options.steps}}})
    return dataclasses.replace(recipe, folded_rotation=rotation)


if __name__ == "__main__":
    main()
