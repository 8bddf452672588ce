"""Holds text that a model sampled itself, and its file in a quantised folder."""

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from twla_jax.errors import TwlaError
from twla_jax.recipe import CalibrationSettings
from twla_jax.text.corpora import SELF

FILE = "self_calibration.npy"  # in a quantised folder: what a later allocation of bits needs of the text


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledText:
    """Rows of tokens that a model sampled, in the order in which they are used.

    Attributes:
      rows: int32, each as long as a calibration window.
      seed: of the sampling.
      held_out: how many of the last rows no calibration sees.
    """

    rows: Int32[np.ndarray, "rows seq_len"]
    seed: int
    held_out: int

    def describe(self) -> dict[str, Any]:
        """Return what a report says of the text: everything but the tokens."""
        return {
            "name": SELF,
            "split": "calibration",
            "source": SELF,
            "temperature": 1.0,
            "sampled_windows": len(self.rows),
            "sha256": hashlib.sha256(self.rows.astype("<i4").tobytes()).hexdigest(),
        }


def dump(text: SampledText, calibration: int) -> bytes:
    """Return a `.npy` file of the first `calibration` rows and those held out, which bits are allocated on."""
    rows = np.concatenate([text.rows[:calibration], text.rows[len(text.rows) - text.held_out :]])
    file = io.BytesIO()
    np.save(file, rows.astype(np.uint16 if rows.max() < 2**16 else np.int32))
    return file.getvalue()


def read(folder: str | Path, drawn: CalibrationSettings) -> SampledText:
    """Read what `dump` left in a quantised folder.

    Raises:
      TwlaError: the folder's model was not calibrated on its own text.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise TwlaError(f"{folder}: holds no text of the model itself; --calibration must name another text")
    try:
        with path.open("rb") as file:
            rows = np.load(file, allow_pickle=False)
        fits = rows.ndim == 2 and rows.dtype.kind in "iu" and len(rows) >= drawn.windows
    except Exception:  # numpy raises a dozen kinds for what is no such file
        fits, rows = False, np.zeros((0, 0))
    if not fits:
        raise TwlaError(f"{path}: holds no rows of tokens; the folder is damaged")
    rows = rows.astype(np.int32)
    return SampledText(rows=rows, seed=drawn.seed, held_out=len(rows) - drawn.windows)
