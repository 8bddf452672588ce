"""Makes numbers of weights in MXFP4, exactly: blocks of 32 values of four bits that share a power of two.

The format is that of the OCP Microscaling specification 1.0; the layout is that of gpt-oss: `X_blocks`
`[experts, out, groups, 16]`, two values a byte with the first in the low bits, and the exponents `X_scales`
`[experts, out, groups]`, biased by 127. Every value has at most two significant bits, so bfloat16 holds it.
"""

from collections.abc import Collection
from typing import Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from twla_jax.errors import TwlaError
from twla_jax.models.stored_tensors import TensorSource

BLOCKS, SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
_PAIRS = _VALUES[np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1)]
_POWERS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))


class StoredSource(TensorSource, Protocol):
    """A source that also gives the bytes of types that numpy has no name for."""

    def stored_type(self, name: str) -> str:
        """Return the type by the name that safetensors has for it."""
        ...

    def stored_bytes(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor as they are stored."""
        ...


class Mxfp4Source:
    """A source whose pairs `X_blocks` and `X_scales` come as one tensor X, bfloat16 `[experts, in, out]`."""

    def __init__(self, source: StoredSource):
        """Find the scales of all blocks.

        Args:
          source: the tensors as stored.

        Raises:
          TwlaError: blocks without scales, of other types than bytes, or of shapes that do not fit.
        """
        self._source = source
        held = source.names()
        self._packed = {name.removesuffix(BLOCKS) for name in held if name.endswith(BLOCKS)}
        for name in sorted(self._packed):
            self._check(name, held)
        parts = {f"{name}{ending}" for name in self._packed for ending in (BLOCKS, SCALES)}
        self._names = [*(name for name in held if name not in parts), *self._packed]

    def _check(self, name: str, held: Collection[str]) -> None:
        blocks, scales = f"{name}{BLOCKS}", f"{name}{SCALES}"
        where = self._source.where(blocks)
        if scales not in held or name in held:
            what = f"stands beside {name!r}" if name in held else f"has no {scales!r} beside it"
            raise TwlaError(f"{where}: tensor {blocks!r} {what}")
        for part in (blocks, scales):
            if self._source.stored_type(part) != "U8":
                raise TwlaError(f"{where}: tensor {part!r} is {self._source.stored_type(part)}, not U8")
        shape, of_scales = self._source.shape(blocks), self._source.shape(scales)
        if len(shape) != 4 or shape != (*of_scales, _BYTES):
            raise TwlaError(
                f"{where}: tensor {blocks!r} has shape {list(shape)}, and {scales!r} {list(of_scales)}"
            )

    def names(self) -> Collection[str]:
        """Return the names of all tensors, those in MXFP4 without their endings."""
        return self._names

    def where(self, name: str) -> str:
        """Return the file of the tensor, or of its blocks."""
        return self._source.where(f"{name}{BLOCKS}" if name in self._packed else name)

    def dtype(self, name: str) -> np.dtype:
        """Return bfloat16 for what was packed, else the stored type."""
        return np.dtype(ml_dtypes.bfloat16) if name in self._packed else self._source.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that `read` gives."""
        if name not in self._packed:
            return self._source.shape(name)
        experts, rows, groups = self._source.shape(f"{name}{SCALES}")
        return experts, groups * 2 * _BYTES, rows

    def read(self, name: str) -> np.ndarray:
        """Return the tensor; what was packed, dequantised."""
        if name not in self._packed:
            return self._source.read(name)
        blocks, scales = (
            self._source.stored_bytes(f"{name}{ending}").reshape(self._source.shape(f"{name}{ending}"))
            for ending in (BLOCKS, SCALES)
        )
        return dequantize(blocks, scales).swapaxes(1, 2)


def dequantize(
    blocks: UInt8[np.ndarray, "experts n groups 16"], scales: UInt8[np.ndarray, "experts n groups"]
) -> Float[np.ndarray, "experts n m"]:
    """Return `2^(s − 127)` times each value of its block, bfloat16; NaN where the scale is 255, as the format says."""
    experts, n, groups = scales.shape
    result = np.empty((experts, n, groups * 2 * _BYTES), ml_dtypes.bfloat16)
    # What is not finite is named by who fills the decoder. One expert at a time, so that little is held in float32.
    with np.errstate(over="ignore", invalid="ignore"):
        for expert in range(experts):
            values = _PAIRS[blocks[expert]].reshape(n, groups, -1) * _POWERS[scales[expert]][..., None]
            result[expert] = values.reshape(n, -1)
    return result
