"""Rotations in the layout the kernels read, made once at load."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twla_jax.core.kotms import KroneckerRotation

_ROWS = 16  # what a tile of bf16 has on both matrix units


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRotation:
    """`x ↦ vec(L · mat(x) · R)` with R transposed and L filled up with zeros to a multiple of 16 rows and columns.

    `size` is that of L itself.
    """

    left: Float[Array, "rows rows"]
    right_transposed: Float[Array, "r r"]
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def factors(self) -> tuple[Float[Array, "l l"], Float[Array, "r r"]]:
        """L and R."""
        return self.left[: self.size, : self.size], self.right_transposed.T


def kernel_rotation(rotation: KroneckerRotation, dtype) -> KernelRotation:
    """The factors of `rotation`, without leading axes, in the type that activations have."""
    left, right = (jnp.asarray(factor, dtype) for factor in (rotation.left, rotation.right))
    padding = -len(left) % _ROWS
    return KernelRotation(
        left=jnp.pad(left, ((0, padding), (0, padding))), right_transposed=right.T, size=len(left)
    )
