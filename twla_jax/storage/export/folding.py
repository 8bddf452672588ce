"""Gives a quantised model's parameters one by one, as dense matrices in the basis of the original model."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from twla_jax.core import kotms
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import dequantize
from twla_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of one layer.

    Attributes:
      name: in the decoder, `blocks.q.kernel`.
      layer: None outside the blocks.
      held: the decoder's value: an array, `[in, out]` for kernels of linears, or a packed tensor; of all layers.
      held_rotation: of the input that a linear reads, of all layers; None if there is none.
    """

    name: str
    layer: int | None
    held: Any
    held_rotation: KroneckerRotation | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape as published, `[out, in]` for matrices."""
        shape = self.held.shape if self.layer is None else self.held.shape[1:]
        packed = isinstance(self.held, PackedTensor)
        return shape[::-1] if self.name.endswith(".kernel") and not packed else shape

    @property
    def value(self) -> Any:
        """Return the array or packed tensor of this layer."""
        return self._of_layer(self.held)

    @property
    def rotation(self) -> KroneckerRotation | None:
        """Return the rotation of this layer."""
        return self._of_layer(self.held_rotation)

    def dense(self) -> Float[np.ndarray, "*shape"]:
        """Return the parameter in float32, a rotation folded back into the weights."""
        value, rotation = self.value, self.rotation
        if isinstance(value, PackedTensor):
            rows = dequantize(value)
        else:
            rows = jnp.asarray(value, jnp.float32)
            rows = rows.T if self.name.endswith(".kernel") else rows
        return np.asarray(rows if rotation is None else fold(rows, rotation))

    def _of_layer(self, stack: Any) -> Any:
        return stack if self.layer is None else jax.tree.map(lambda leaf: leaf[self.layer], stack)


@jax.jit
def fold(rows: Float[Array, "n m"], rotation: KroneckerRotation) -> Float[Array, "n m"]:
    """Return `Ŵ Q`, the weights that give on x what `rows` give on the rotated `Q x`.

    `w · vec(L mat(x) R) = vec(Lᵀ mat(w) Rᵀ) · x`, which also holds for factors that are orthogonal only to the
    precision in which they are stored.
    """
    return kotms.rotate(rows, rotation.left.astype(rows.dtype).T, rotation.right.astype(rows.dtype).T)


def parameters(model: Decoder) -> Iterator[Parameter]:
    """Yield every parameter, those outside the blocks first; values are computed when they are asked for."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    held = {".".join(map(str, path)): variable.get_value() for path, variable in flat}
    settings = KroneckerRotation | ActivationQuantizer
    site_of = {linear: site.name for site in model.sites for linear in site.linears}
    weights = {name: value for name, value in held.items() if not isinstance(value, settings)}
    blocks = {name: value for name, value in weights.items() if name.startswith("blocks.")}
    for name in sorted(weights.keys() - blocks.keys()):
        yield Parameter(name=name, layer=None, held=weights[name])
    for layer in range(model.config.num_layers):
        for name, value in blocks.items():
            rotation = None
            if name.endswith(".kernel"):
                rotation = held.get(f"blocks.{site_of[name.split('.')[1]]}_input.rotation")
            yield Parameter(name=name, layer=layer, held=value, held_rotation=rotation)
