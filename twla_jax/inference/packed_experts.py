"""Holds the linears of a layer's experts that read one input, in the form that kernels take."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from twla_jax.core.tensors import TernaryTensor
from twla_jax.errors import TwlaError
from twla_jax.inference.packed_linear import for_kernels
from twla_jax.models.blocks import ChainBlock, Site
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.expert_matmul import expert_matmul, expert_products
from twla_jax.ops.ternary_matmul import KernelWeight, kernel_weight
from twla_jax.ops.tokens import QuantizedTokens

_kernel_weights = jax.jit(jax.vmap(lambda tensors: kernel_weight(tensors)))


class PackedExperts(nnx.Module):
    """One or several linears of each expert, as one matrix an expert: ternary ones packed, others in `dtype`."""

    def __init__(
        self,
        block: ChainBlock,
        site: Site,
        *,
        dtype: jnp.dtype,
        mesh: Mesh | None,
        implementation: Implementation | None,
    ):
        if mesh is not None:
            raise TwlaError("experts cannot be spread over a mesh; run the model on one device")
        kernels = [linear.kernel.get_value() for linear in block.linears(site)]
        if all(isinstance(kernel, TernaryTensor) for kernel in kernels):
            planes = zip(*(kernel.planes() for kernel in kernels), strict=True)
            weights = [for_kernels(_kernel_weights(plane)) for plane in planes]
        else:
            weights = [jnp.concatenate([jnp.asarray(kernel, dtype) for kernel in kernels], axis=-1)]
        self.weights = nnx.List([nnx.Param(weight) for weight in weights])
        biases = [linear.bias.get_value() for linear in block.linears(site) if linear.bias is not None]
        self.bias = nnx.data(nnx.Param(jnp.concatenate(biases, axis=-1).astype(dtype)) if biases else None)
        self.splits = tuple(linear.features[1] for linear in block.linears(site))
        self.dtype = dtype
        self.implementation: Implementation | None = implementation

    def __call__(
        self, x: QuantizedTokens | Float[Array, "b t *k m"], experts: Int32[Array, "b t k"]
    ) -> tuple[Float[Array, "b t k _"], ...]:
        """Return the outputs of each linear, of each of a token's experts."""
        weights: list[Any] = [weight.get_value() for weight in self.weights]
        if isinstance(weights[0], KernelWeight):
            dtype = self.dtype if len(weights) == 1 else jnp.float32
            options = {"out_dtype": dtype, "implementation": self.implementation}
            y = sum(expert_matmul(x, weight, experts, **options) for weight in weights)
        else:
            assert not isinstance(x, QuantizedTokens)  # which are made for ternary weights alone
            y = expert_products(x, weights[0], experts)
        y = jnp.asarray(y, self.dtype)
        y = y if self.bias is None else y + self.bias.get_value()[experts]
        return tuple(jnp.split(y, np.cumsum(self.splits)[:-1], axis=-1))
