"""Makes weights that are stored in eight bits, with a scale a block, float32 again, exactly as the format defines them.

`W[i, j] = w[i, j] · s[i // rows, j // columns]`, in float32, with `s` in the tensor `weight_scale_inv` beside `weight`.
"""

import logging
import math
import operator
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.config_keys import FLOAT8, float8_settings
from twla_jax.models.io.shards import Shards

_log = logging.getLogger(__name__)
_SCALE = "_scale_inv"
SCALES = f".weight{_SCALE}"  # how the names of scales end
_OF_ACTIVATIONS = (".activation_scale", ".input_scale")
_VALUES = {
    "F8_E4M3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "F8_E5M2": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32),
}
_POWERS = np.append(np.ldexp(1.0, np.arange(-127, 128)), np.nan).astype(
    np.float32
)  # of bytes that are exponents


def dequantized(shards: Shards, config: Mapping[str, Any], folder: Path) -> "Shards | Float8Source":
    """Return a model's tensors, those of eight bits as float32.

    Args:
      shards: of the folder.
      config: contents of its `config.json`.
      folder: for messages.

    Raises:
      TwlaError: a scale and a weight that do not belong together.
    """
    settings = float8_settings(config)
    return shards if settings is None else Float8Source(shards, settings, folder)


class Float8Source:
    """A source whose tensors of eight bits come multiplied by their scales, as float32."""

    def __init__(self, source: Shards, settings: Mapping[str, Any], folder: Path):
        """Find every weight's scale.

        Args:
          source: the tensors as stored.
          settings: the `quantization_config`.
          folder: for messages.

        Raises:
          TwlaError: a scale without its weight, of another shape than the weight's blocks, or beside a weight that is
            not of eight bits.
        """
        self._source = source
        self.where, self.shape = source.where, source.shape
        block = settings.get("weight_block_size", FLOAT8["weight_block_size"])
        self._exponents = settings.get("scale_fmt") == "ue8m0"
        held = source.names()
        unread = [name for name in held if name.endswith(_OF_ACTIVATIONS)]
        if unread:
            _log.warning(
                "%s: %d scales of activations are left out (%s, …)", folder, len(unread), min(unread)
            )
        scales = {name.removesuffix(_SCALE): name for name in held if name.endswith(SCALES)}
        left_out = {*scales.values(), *unread}
        self._names = [name for name in held if name not in left_out]
        self._scaled = {name: (scale, self._block(name, scale, block)) for name, scale in scales.items()}

    def _block(self, name: str, scale: str, block: list[int] | None) -> tuple[int, int]:
        """Return rows and columns of a block, which the shape of the scale has to fit."""
        if name not in self._source.names() or self._source.stored_type(name) not in _VALUES:
            raise TwlaError(f"{self.where(scale)}: tensor {scale!r} has no weight of eight bits beside it")
        shape, grid = self.shape(name), self.shape(scale)
        if len(shape) != 2:
            raise TwlaError(f"{self.where(name)}: tensor {name!r} of eight bits has shape {list(shape)}")
        if math.prod(grid) == 1 and (block is None or all(map(operator.le, shape, block))):
            return shape
        if block is None or grid != (-(-shape[0] // block[0]), -(-shape[1] // block[1])):
            wanted = "a single scale" if block is None else f"a scale for every {block[0]} × {block[1]}"
            raise TwlaError(f"{self.where(scale)}: tensor {scale!r} has shape {list(grid)}, not {wanted}")
        return block[0], block[1]

    def names(self) -> Collection[str]:
        """Return the names of all tensors but the scales."""
        return self._names

    def dtype(self, name: str) -> np.dtype:
        """Return float32 for what is scaled, else the stored type."""
        return np.dtype(np.float32) if name in self._scaled else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Return the tensor; of eight bits, the products with its scales."""
        if name not in self._scaled:
            return self._source.read(name)
        scale, (rows, columns) = self._scaled[name]
        values = _VALUES[self._source.stored_type(name)][self._source.stored_bytes(name)]
        values = values.reshape(self.shape(name))
        scales = self._scales(scale).reshape(-(-values.shape[0] // rows), -1)
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # what is not finite is named by who fills the decoder
            for index, row in enumerate(scales):
                values[index * rows : (index + 1) * rows] *= np.repeat(row, columns)[: values.shape[1]]
        return values

    def _scales(self, name: str) -> np.ndarray:
        stored = self._source.stored_type(name)
        if stored == "F8_E8M0" or (stored == "U8" and self._exponents):
            return _POWERS[self._source.stored_bytes(name)]
        _ = self._source.dtype(name)  # refuses other types
        return self._source.read(name).astype(np.float32)
