"""The small models of `tests/goldens`, as files."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz") if path.stem != "smollm2")


class Golden:
    """One small model: its config.json, its weights under their published names, tokens and the logits they give."""

    def __init__(self, name: str):
        stored = np.load(GOLDENS / f"{name}.npz")
        self.config = json.loads(str(stored["config"]))
        self.tokens, self.logits = stored["tokens"], stored["logits"]
        self.weights = {
            key.removeprefix("weight:"): stored[key] for key in stored.files if key.startswith("weight:")
        }

    def write(self, folder: Path) -> Path:
        """A Hugging Face folder with a single safetensors file."""
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.weights, folder / "model.safetensors")
        return folder

    def assert_logits(self, logits) -> None:
        """The largest difference is at most 1e-4 of the largest logit."""
        assert logits.shape == self.logits.shape
        assert np.abs(np.asarray(logits) - self.logits).max() <= 1e-4 * np.abs(self.logits).max()
