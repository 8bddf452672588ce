"""Puts a packed kernel in the place of a Flax module's own, and multiplies by it."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twla_jax.core import activation, gptq, kotms
from twla_jax.core.activation import ActivationQuantizer
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.settings import ActivationSettings, RotationSettings, WeightSettings
from twla_jax.core.tensors import IntegerTensor, TernaryTensor, dequantize, packed_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedKernel:
    """A quantised kernel as one leaf of a model's parameters: a pytree of packed arrays.

    It stands for an array of `shape` whose axes `contracted` are summed over. `tensor` is that array as a matrix, rows
    being outputs, in the rotated basis of its input.
    """

    tensor: TernaryTensor | IntegerTensor
    rotation: KroneckerRotation | None
    activation: ActivationQuantizer
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    contracted: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: DTypeLike = dataclasses.field(metadata={"static": True})  # of the array it stands for

    @property
    def ndim(self) -> int:
        """Return the number of axes of the array it stands for."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> "PackedKernel":
        if index is not Ellipsis:
            raise TypeError("a packed kernel has no slices; only [...] is possible")
        return self

    def multiply(self, x: Array, axes: Sequence[int]) -> Array:
        """Return `x` contracted with the kernel, in `x.dtype`: x's other axes, then the kernel's other axes.

        Args:
          x: any shape; rotated and quantised here, as the kernel was fitted for.
          axes: the axes of x that meet `contracted`, in that order.
        """
        free = [axis for axis in range(x.ndim) if axis not in axes]
        rows = jnp.transpose(x, (*free, *axes)).reshape(*(x.shape[axis] for axis in free), -1)
        if self.rotation is not None:
            rows = self.rotation(rows)
        outputs = packed_matmul(self.activation(rows), self.tensor)
        others = (size for axis, size in enumerate(self.shape) if axis not in self.contracted)
        return outputs.reshape(*outputs.shape[:-1], *others)


@functools.partial(jax.jit, static_argnames=("contracted", "weights", "rotation", "activations"))
def pack_kernel(
    kernel: Float[Array, "*shape"],
    moment: Float[Array, "m m"],
    tokens: Float[Array, ""],
    sample: Float[Array, "c m"],
    key: jax.Array,
    *,
    contracted: tuple[int, ...],
    weights: WeightSettings,
    rotation: RotationSettings | None,
    activations: ActivationSettings,
) -> tuple[PackedKernel, dict[str, Float[Array, ""]]]:
    """Rotate and quantise one kernel, and fit the clips of its input.

    Args:
      kernel: of any shape; as a matrix it is `[n, m]`, m the product of the sizes of the axes `contracted`.
      moment: `Σ xᵀx` of the inputs.
      tokens: how many inputs `moment` sums over.
      sample: some inputs, on which clips are chosen; rows of zeros count for nothing.
      key: of the rotation's random start.
      contracted: axes of the kernel that a product contracts.
      weights: settings of the quantiser.
      rotation: settings of the rotation; None for none.
      activations: settings of the clips.

    Returns:
      The packed kernel, and the figures of `core.gptq.quantize_matrix`.
    """
    free = [axis for axis in range(kernel.ndim) if axis not in contracted]
    m = math.prod(kernel.shape[axis] for axis in contracted)
    rows = jnp.transpose(kernel, (*free, *contracted)).reshape(-1, m).astype(jnp.float32)
    fitted = None
    if rotation is not None:
        sizes = kotms.factor_sizes(m, rows.shape[0], rotation.factors)
        inputs = sample if rotation.range_weight else None
        fitted, _ = kotms.fit_rotation(rows, key, inputs, settings=rotation, sizes=sizes)
        left, right = fitted.left.astype(jnp.float32), fitted.right.astype(jnp.float32)
        rows, sample = kotms.rotate(rows, left, right), kotms.rotate(sample, left, right)
        moment = kotms.rotate_moment(moment, fitted)
    tensor, figures = gptq.quantize_matrix(rows, moment, tokens, settings=weights)
    dense = dequantize(tensor)
    metric = jnp.matmul(dense.T, dense, precision=jax.lax.Precision.HIGHEST)
    clips = activation.fit_clips(sample, metric, activations.clips)
    bits = activations.bits
    quantizer = ActivationQuantizer(bits=jnp.int32(bits), clips=clips, enabled=bits < activation.OFF)
    packed = PackedKernel(tensor, fitted, quantizer, kernel.shape, contracted, jnp.dtype(kernel.dtype))
    return packed, figures
