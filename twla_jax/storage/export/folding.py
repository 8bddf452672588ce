"""Gives a quantised model's parameters one by one, as dense matrices in the basis of the original model.

The matrices of a layer's experts come one by one, or as one stack, whichever way the files of a family hold them.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from twla_jax.core import kotms
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import dequantize
from twla_jax.models.blocks import Site
from twla_jax.models.decoder import Decoder

_rotate_back = jax.jit(kotms.rotate_back)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of one layer.

    Attributes:
      name: in the decoder, `blocks.q.kernel`.
      layer: None outside the blocks.
      held: the decoder's value: an array, `[in, out]` for kernels of linears, or a packed tensor; of all layers.
      held_rotation: of the input that a linear reads, of all layers; None if there is none.
      expert: of a matrix of experts which one it is; None for all of them, or where there are none.
      site: of the linear that it is the kernel of; None for anything else.
    """

    name: str
    layer: int | None
    held: Any
    held_rotation: KroneckerRotation | None = None
    expert: int | None = None
    site: Site | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape as published, `[out, in]` for matrices, `[experts, out, in]` for those of all experts."""
        shape = self.held.shape[(self.layer is not None) + (self.expert is not None) :]
        packed = isinstance(self.held, PackedTensor)
        turned = self.name.endswith(".kernel") and not packed
        return (*shape[:-2], shape[-1], shape[-2]) if turned else shape

    @property
    def value(self) -> Any:
        """Return the array or packed tensor of this layer, and of one expert if it is of one."""
        value = self._of_layer(self.held)
        return value if self.expert is None else jax.tree.map(lambda leaf: leaf[self.expert], value)

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
            rows = jnp.swapaxes(rows, -1, -2) if self.name.endswith(".kernel") else rows
        return np.asarray(rows if rotation is None else _rotate_back(rows, rotation))

    def _of_layer(self, stack: Any) -> Any:
        return stack if self.layer is None else jax.tree.map(lambda leaf: leaf[self.layer], stack)


def parameters(model: Decoder, names: Mapping[str, str] | None = None) -> Iterator[Parameter]:
    """Yield every parameter, those outside the blocks first; values are computed when they are asked for.

    Args:
      model: of any family.
      names: of tensors in the files to write, by parameter: where one has places for a layer and an expert, the
        matrices of experts are yielded one by one. None yields those of a layer together.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    held = {".".join(map(str, path)): variable.get_value() for path, variable in flat}
    settings = KroneckerRotation | ActivationQuantizer
    site_of = {f"blocks.{linear}.kernel": site for site in model.sites for linear in site.linears}
    weights = {name: value for name, value in held.items() if not isinstance(value, settings)}
    blocks = {name: value for name, value in weights.items() if name.startswith("blocks.")}
    for name in sorted(weights.keys() - blocks.keys()):
        yield Parameter(name=name, layer=None, held=weights[name])
    for layer in range(model.config.num_layers):
        for name, value in blocks.items():
            site = site_of.get(name)
            rotation = None if site is None else held.get(f"blocks.{site.name}_input.rotation")
            apart = names is not None and names[name].count("{}") == 2
            for expert in range(model.config.num_experts) if apart else (None,):
                yield Parameter(
                    name=name, layer=layer, held=value, held_rotation=rotation, expert=expert, site=site
                )
