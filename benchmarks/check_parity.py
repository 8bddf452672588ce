"""Compares the decoder with transformers' PyTorch models: every small random model of tests/goldens, in float32.

    python benchmarks/check_parity.py [NAME …]

Prints, for each, the largest difference of a logit from PyTorch's as a share of the largest logit. Exits with 1 where
that is above 1e-4, the bound of the tests.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from twla_jax.models.io.readers import load_model

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
BOUND = 1e-4
forward = jax.jit(lambda model, tokens: model(tokens))


def difference(path: Path) -> tuple[str, float]:
    """Returns the family of a golden, and its largest difference as a share of the largest logit."""
    stored = np.load(path)
    weights = {key.removeprefix("weight:"): stored[key] for key in stored.files if key.startswith("weight:")}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(str(stored["config"]))
        save_file(weights, Path(folder) / "model.safetensors")
        logits = np.asarray(forward(load_model(folder), stored["tokens"]))
    share = np.abs(logits - stored["logits"]).max() / np.abs(stored["logits"]).max()
    return json.loads(str(stored["config"]))["model_type"], float(share)


def main() -> int:
    """Prints the table and returns the exit status."""
    names = sys.argv[1:] or sorted(path.stem for path in GOLDENS.glob("*.npz") if path.stem != "smollm2")
    found = {name: difference(GOLDENS / f"{name}.npz") for name in names}
    for name, (family, share) in found.items():
        print(f"| {family} | {name} | {share:.1e} |", flush=True)
    return int(any(share > BOUND for _, share in found.values()))


if __name__ == "__main__":
    sys.exit(main())
