"""Builds the sdist and from it the wheel, and tries each in a fresh environment: `python benchmarks/clean_install.py`.

Each environment quantises a model of random weights outside this folder, reads it back and inspects it, with warnings
as errors. It needs a package index, some minutes and 2 GB below the folder for temporary files.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRIED = """
import warnings
warnings.simplefilter("error")
from pathlib import Path
import twla_jax
assert all(getattr(twla_jax, name) is not None for name in twla_jax.__all__)
assert Path(twla_jax.__file__).with_name("py.typed").is_file()
import numpy as np
from flax import nnx
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import config_from_hf
from twla_jax.recipe import recipe_names
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
config = config_from_hf({"model_type": "llama", **sizes, "num_attention_heads": 2, "num_key_value_heads": 1})
model, windows = Decoder(config, rngs=nnx.Rngs(0)), np.arange(64).reshape(4, 16)
recipe = twla_jax.Recipe.from_dict({"weights": {"group_size": 16}, "rotation": {"steps": 2}})
quantized, _ = twla_jax.quantize(model, windows, recipe, progress=False)
twla_jax.save(quantized, None, "out", recipe, {})
again = twla_jax.load("out")[0]
assert np.array_equal(quantized(windows), again(windows))
print(len(recipe_names()), "recipes")
"""


def main() -> None:
    """Build, install and try; any failure ends it."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        builder = environment(work / "builder", "build>=1.2,<2")
        run(builder, "-m", "build", "--outdir", work / "dist", ROOT)
        rows = []
        for file in sorted((work / "dist").iterdir()):
            python = environment(work / file.suffix[1:], file)
            place = work / f"in-{file.suffix[1:]}"
            place.mkdir()
            run(python, "-m", "pip", "check")
            recipes = run(python, "-c", TRIED, cwd=place)
            run(python, "-m", "twla_jax", "inspect", "out", "--verify", cwd=place)
            version = run(python, "-m", "twla_jax", "--version", cwd=place)
            told = run(python, ROOT / "benchmarks" / "dependencies.py").splitlines()[-1]
            rows.append(f"| {file.name} | {file.stat().st_size:,} | {version}, {recipes} | {told} |")
    print("\n| | bytes | | |\n|---|---|---|---|", *rows, sep="\n")


def environment(place: Path, *packages: object) -> Path:
    """Return the interpreter of a new environment with these packages."""
    venv.create(place, with_pip=True)
    run(place / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return place / "bin" / "python"


def run(python: Path, *arguments: object, cwd: Path | None = None) -> str:
    """Return what a command prints; one that fails ends all."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))[:200]}: status {done.returncode}\n{done.stdout}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
