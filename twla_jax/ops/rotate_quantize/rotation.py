"""Converts rotations to the layout the kernels read, once, when a model is loaded."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twla_jax.core.kotms import KroneckerRotation

_FACTOR_PADDING = 16  # rows of a bf16 tile on both GPUs and TPUs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRotation:
    """Holds `x ↦ vec(L · mat(x) · R)`: R transposed, and L padded with zeros to a multiple of 16 rows and columns.

    `size` is that of L itself.
    """

    left: Float[Array, "rows rows"]
    right_transposed: Float[Array, "r r"]
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def factors(self) -> tuple[Float[Array, "l l"], Float[Array, "r r"]]:
        """Return L and R."""
        return self.left[: self.size, : self.size], self.right_transposed.T


def kernel_rotation(rotation: KroneckerRotation, dtype) -> KernelRotation:
    """Return the factors of `rotation`, without leading axes, in the dtype of activations."""
    left, right = (jnp.asarray(factor, dtype) for factor in (rotation.left, rotation.right))
    padding = -len(left) % _FACTOR_PADDING
    return KernelRotation(
        left=jnp.pad(left, ((0, padding), (0, padding))), right_transposed=right.T, size=len(left)
    )
