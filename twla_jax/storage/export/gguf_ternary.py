"""Packs planes into llama.cpp's ternary types: one float16 scale over 64 or 256 columns, two bits a weight."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float16, Int8, UInt8

from twla_jax.core.tensors import TernaryTensor
from twla_jax.errors import TwlaError
from twla_jax.storage.export.plain_planes import RECIPE, Plane


@dataclasses.dataclass(frozen=True, kw_only=True)
class TernaryType:
    """A type of GGUF's matrices.

    Attributes:
      number: of the type, and `file_type` of a file of mostly this type, as llama.cpp counts them.
      block: columns that share a scale.
      block_bytes: of a block.
      pack: from codes `[blocks, block]` and scales `[blocks]` to bytes `[blocks, block_bytes]`.
    """

    name: str
    number: int
    file_type: int
    block: int
    block_bytes: int
    pack: Callable[[Int8[np.ndarray, "b g"], Float16[np.ndarray, " b"]], UInt8[np.ndarray, "b bytes"]]

    def require(self, tensors: list[TernaryTensor]) -> None:
        """Refuse matrices whose columns or groups are not whole blocks.

        Raises:
          TwlaError: one has; names the group size that would do, if any.
        """
        for tensor in tensors:
            if tensor.in_features % self.block:
                raise TwlaError(
                    f"{self.name} needs rows of a multiple of {self.block} weights, a matrix has {tensor.in_features}; "
                    "give --type f16"
                )
        for tensor in tensors:
            if tensor.group_size % self.block and tensor.group_size < tensor.in_features:
                raise TwlaError(
                    f"{self.name} has one scale for {self.block} columns, this model one for {tensor.group_size}; "
                    f"quantise with the recipe {RECIPE} and weights.group_size = {self.block}"
                )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that a matrix takes, or a stack of them."""
        return math.prod(shape) // self.block * self.block_bytes

    def rows(self, plane: Plane) -> UInt8[np.ndarray, "n bytes"]:
        """Return a matrix as this type holds it; `plane` has a scale for every block."""
        blocks = self.pack(plane.codes.reshape(-1, self.block), plane.scales.reshape(-1))
        return blocks.reshape(len(plane.codes), -1)


def _pack_q2_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the scale, then four neighbouring codes a byte, lowest bits first."""
    fields = (codes + np.int8(1)).astype(np.uint8).reshape(len(codes), -1, 4)
    return np.concatenate([_halves(scales), _merge(fields)], axis=1)


def _pack_tq2_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return blocks of two runs of 128 codes, four that are 32 apart in a byte, lowest bits first, and the scale."""
    fields = (codes + np.int8(1)).astype(np.uint8).reshape(len(codes), 2, 4, 32)
    return np.concatenate([_merge(fields.swapaxes(2, 3)).reshape(len(codes), -1), _halves(scales)], axis=1)


def _merge(fields: np.ndarray) -> np.ndarray:
    return np.bitwise_or.reduce(fields << np.arange(0, 8, 2, dtype=np.uint8), axis=-1)


def _halves(scales: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(scales.astype("<f2")).view(np.uint8).reshape(-1, 2)


TYPES = {
    "q2_0": TernaryType(name="Q2_0", number=42, file_type=41, block=64, block_bytes=18, pack=_pack_q2_0),
    "tq2_0": TernaryType(name="TQ2_0", number=35, file_type=37, block=256, block_bytes=66, pack=_pack_tq2_0),
}
