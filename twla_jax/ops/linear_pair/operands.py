"""Groups the operands of one linear of a pair."""

import dataclasses

import jax
from jaxtyping import Array, Float, Float32

from twla_jax.ops.rotate_quantize import KernelRotation
from twla_jax.ops.ternary_matmul import KernelWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearOperands:
    """Holds the operands of one linear, named as `quantized_linear` takes them."""

    rotation: KernelRotation
    settings: Float32[Array, " 3"] | None
    weight: KernelWeight
    norm_scale: Float[Array, " m"] | None = None
    epsilon: float = dataclasses.field(default=0.0, metadata={"static": True})
