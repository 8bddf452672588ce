"""A quantised decoder in the form that runs fast: kernel-ready weights, one product an input, integers where it can.

Each input of a block goes once through `rotate_quantize`, and the linears that read it are one `ternary_matmul`. Where
an input's activations are not quantised, they are only rotated, and meet the same packed weights in bf16.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from twla_jax.activation import OFF, ActivationQuantizer, select_clip
from twla_jax.errors import TwlaError
from twla_jax.kotms import rotate
from twla_jax.models.decoder import SITES, Block, Decoder, RMSNorm
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.rotate_quantize import kernel_rotation, quantizer_settings, rotate_quantize
from twla_jax.ops.ternary_matmul import kernel_weight, ternary_matmul
from twla_jax.ops.tokens import QuantizedTokens
from twla_jax.ternary import TernaryTensor


def prepare_for_inference(model: Decoder, *, implementation: Implementation | None = None) -> Decoder:
    """The same quantised model with its weights in the kernels' layout, layer by layer.

    Its activation bits are fixed from here on whether an input is quantised, not at how many bits. It is for inference
    alone: it has no gradient, is not saved, and lives on one device.

    Args:
      model: with ternary weights in all of its blocks, as arrays, not tracers.
      implementation: as `ternary_matmul` and `rotate_quantize` take it.
    Raises:
      TwlaError: the model is not quantised, or its group size is one that the kernels have no place for.
    """
    return IntegerDecoder(model, implementation=implementation)


class IntegerDecoder(Decoder):
    """`Decoder` with a list of `IntegerBlock`s, run one after the other: a scan would copy each layer's weights."""

    def __init__(self, model: Decoder, *, implementation: Implementation | None):
        if not isinstance(model.blocks.q.kernel.get_value(), TernaryTensor):
            raise TwlaError(
                "only a ternary model can be prepared for inference; this one has float or integer weights"
            )
        self.config, self.dtype = model.config, model.dtype
        self.embed, self.norm, self.head = model.embed, model.norm, model.head
        self.blocks = nnx.List(
            [
                IntegerBlock(
                    jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), model.blocks),
                    dtype=model.dtype,
                    implementation=implementation,
                )
                for i in range(model.config.num_layers)
            ]
        )

    def through_blocks(self, step: Callable, carry: Any) -> Any:
        """The carry after `step(carry, (block, window, index))` of every block, in order."""
        windows = self.windows()
        for index, block in enumerate(self.blocks):
            carry, _ = step(carry, (block, windows[index], index))
        return carry


class KernelInput(nnx.Module):
    """An input of linears: norm, rotation and quantiser as one op; without a quantiser, norm and rotation in bf16."""

    def __init__(self, block: Block, site: str, *, norm: RMSNorm | None, dtype, implementation):
        transform = getattr(block, f"{site}_input")
        rotation = None if transform.rotation is None else transform.rotation.get_value()
        quantizer = None if transform.activation is None else transform.activation.get_value()
        self.rotation = nnx.data(None if rotation is None else nnx.Param(kernel_rotation(rotation, dtype)))
        self.norm = norm
        settings = _settings(quantizer)
        self.settings = nnx.data(None if settings is None else nnx.Param(settings))
        self.implementation = implementation

    def __call__(self, x: Float[Array, "*tokens m"]) -> QuantizedTokens | Float[Array, "*tokens m"]:
        """What the linears read."""
        rotation = None if self.rotation is None else self.rotation.get_value()
        if self.settings is None:
            x = x if self.norm is None else self.norm(x)
            return x if rotation is None else rotate(x, *rotation.factors)
        return rotate_quantize(
            x,
            rotation,
            self.settings.get_value(),
            norm_scale=None if self.norm is None else self.norm.scale.get_value(),
            epsilon=0.0 if self.norm is None else self.norm.epsilon,
            implementation=self.implementation,
        )


class KernelLinear(nnx.Module):
    """One or several linears that read the same input, as one matrix; `y` lists their outputs side by side."""

    def __init__(self, block: Block, names: tuple[str, ...], *, dtype, implementation):
        linears = [getattr(block, name) for name in names]
        weights = [linear.kernel.get_value() for linear in linears]
        biases = [None if linear.bias is None else linear.bias.get_value() for linear in linears]
        planes = list(zip(*(weight.planes() for weight in weights), strict=True))
        self.weight = nnx.Param(kernel_weight(planes[0], biases))
        self.residual = nnx.data(nnx.Param(kernel_weight(planes[1])) if len(planes) > 1 else None)
        self.dtype, self.implementation = dtype, implementation

    def __call__(self, x: QuantizedTokens | Float[Array, "*tokens m"]) -> Float[Array, "*tokens n"]:
        """`x Ŵᵀ + b`, rounded to the model's type."""
        if self.residual is None:
            return ternary_matmul(
                x, self.weight.get_value(), out_dtype=self.dtype, implementation=self.implementation
            )
        parts = [
            ternary_matmul(x, plane.get_value(), out_dtype=jnp.float32, implementation=self.implementation)
            for plane in (self.weight, self.residual)
        ]
        return sum(parts).astype(self.dtype)

    def parts(self, x: QuantizedTokens | Float[Array, "*tokens m"]) -> tuple[Float[Array, "*tokens _"], ...]:
        """The outputs of each linear."""
        splits = np.cumsum(self.weight.get_value().splits)[:-1]
        return tuple(jnp.split(self(x), splits, axis=-1))


class IntegerBlock(Block):
    """`Block` whose norms belong to the inputs that they precede, and whose linears are merged input by input."""

    def __init__(self, block: Block, *, dtype, implementation: Implementation | None):
        def read(site, norm):
            return KernelInput(block, site, norm=norm, dtype=dtype, implementation=implementation)

        def linear(*names):
            return KernelLinear(block, names, dtype=dtype, implementation=implementation)

        self.input_norm = self.post_norm = _nothing
        self.qkv_input, self.mlp_input = read("qkv", block.input_norm), read("mlp", block.post_norm)
        self.o_input, self.down_input = read("o", None), read("down", None)
        self.qkv_linear, self.gate_up_linear = linear(*SITES["qkv"]), linear(*SITES["mlp"])
        self.o, self.down = linear(*SITES["o"]), linear(*SITES["down"])
        self.q_norm, self.k_norm, self.head_dim = block.q_norm, block.k_norm, block.head_dim

    def qkv(self, h: QuantizedTokens | Float[Array, "b t d"]) -> tuple[Float[Array, "b t _"], ...]:
        """Queries, keys and values, one beside the other."""
        return self.qkv_linear.parts(h)

    def gate_up(self, h: QuantizedTokens | Float[Array, "b t d"]) -> Float[Array, "b t hidden"]:
        """`silu(gate(h)) · up(h)`."""
        gate, up = self.gate_up_linear.parts(h)
        return jax.nn.silu(gate) * up


def _nothing(x: jax.Array) -> jax.Array:
    """Stands where `Block` has a norm that its input does here."""
    return x


def _settings(quantizer: ActivationQuantizer | None) -> Float32[Array, " 3"] | None:
    """What `rotate_quantize` needs of a quantiser; None if it is off."""
    if quantizer is None or not quantizer.enabled or int(quantizer.bits) >= OFF:
        return None
    return quantizer_settings(quantizer.bits, select_clip(quantizer.clips, quantizer.bits))
