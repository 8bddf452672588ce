"""Defines the layers that blocks are made of, and changes modules by copies that share their arrays."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import packed_matmul
from twla_jax.ops.expert_matmul import expert_products
from twla_jax.ops.rotate_quantize import rms_norm


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Return the precision of a product: true float32 for float32 on every chip, the chip's own for narrower types."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def shallow_copy[M: nnx.Module](module: M) -> M:
    """Return another module with the same arrays: what is set on it, the original does not see."""
    return nnx.merge(*nnx.split(module))


def replace[M: nnx.Module](module: M, changes: Mapping[str, Any] | None = None, /, **more: Any) -> M:
    """Return a copy of a module with other leaves, submodules or settings; all that is not named is shared.

    Args:
      module: stays as it is.
      changes: new values by dotted path, as `blocks.q.kernel`. An array or packed tensor becomes the `nnx.Param` that
        stands there, also where there was none before; None takes a parameter away.
      more: the same for names without dots.
    """
    result = shallow_copy(module)
    for path, value in {**(changes or {}), **more}.items():
        *parents, last = path.split(".")
        owner = functools.reduce(getattr, parents, result)
        before = getattr(owner, last)
        is_parameter = isinstance(before, nnx.Variable) or before is None
        if is_parameter and not isinstance(value, nnx.Variable | nnx.Module):
            # Marked as data also while None, so that a parameter may be put in later.
            value = nnx.data(None if value is None else nnx.Param(value))
        setattr(owner, last, value)
    return result


class Linear(nnx.Module):
    """`y = x W + b`. `kernel` holds an array `[*leading, in, out]` or a packed tensor, whose rows are outputs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        leading: tuple[int, ...],
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        shape = (*leading, in_features, out_features)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * in_features**-0.5)
        self.bias = nnx.Param(jnp.zeros((*leading, out_features), dtype)) if bias else None

    @property
    def features(self) -> tuple[int, int]:
        """Returns inputs and outputs of one layer, whatever form the kernel has."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, PackedTensor):
            return kernel.in_features, kernel.shape[-2]
        return kernel.shape[-2], kernel.shape[-1]

    def __call__(self, x: Float[Array, "*tokens m"]) -> Float[Array, "*tokens n"]:
        """Apply the layer in `x.dtype`; a packed kernel is unpacked here and nowhere else."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, PackedTensor):
            y = packed_matmul(x, kernel)
        else:
            y = jnp.matmul(x, kernel.astype(x.dtype), precision=precision(x.dtype))
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)


class ExpertLinear(Linear):
    """A linear for each of several experts: `kernel` and `bias` have an axis of experts after those of layers."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        experts: int,
        leading: tuple[int, ...],
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        bias: bool = False,
    ):
        leading = (*leading, experts)
        super().__init__(in_features, out_features, bias=bias, leading=leading, rngs=rngs, dtype=dtype)

    def of_experts(
        self, x: Float[Array, "*tokens m"] | Float[Array, "*tokens k m"], experts: Int32[Array, "*tokens k"]
    ) -> Float[Array, "*tokens k n"]:
        """Return the outputs of each token's k experts, in `x.dtype`.

        Args:
          x: one input a token, or one for each of its experts.
          experts: of each token.
        """
        y = expert_products(x, self.kernel.get_value(), experts)
        return y if self.bias is None else y + self.bias.get_value()[experts].astype(y.dtype)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + ε) · scale`, in float32 inside, `x.dtype` outside."""

    def __init__(self, size: int, *, epsilon: float, leading: tuple[int, ...], dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((*leading, size), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
        """Return x with its last axis normalised, in its shape and dtype."""
        return rms_norm(x, self.scale.get_value(), self.epsilon)


class InputTransform(nnx.Module):
    """Transforms an input: by a `KroneckerRotation`, then an `ActivationQuantizer`; each may be None."""

    rotation: nnx.Param[Any] | None
    activation: nnx.Param[Any] | None

    def __init__(self):
        # Marked as data while None, so that a Param may be put in later.
        self.rotation = nnx.data(None)
        self.activation = nnx.data(None)

    def __call__(self, x: Float[Array, "*tokens m"]) -> Float[Array, "*tokens m"]:
        """Return the transformed x, in `x.dtype`."""
        for transform in (self.rotation, self.activation):
            if transform is not None:
                x = transform.get_value()(x)
        return x
