"""Holds one input of a block and the linears that read it, in the form that kernels take."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from twla_jax.core.activation import OFF, ActivationQuantizer, select_clip
from twla_jax.core.kotms import rotate
from twla_jax.core.tensors import TernaryTensor
from twla_jax.inference import tensor_parallel
from twla_jax.models.blocks import ChainBlock, Site
from twla_jax.models.layers import RMSNorm, precision
from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.dispatch import Implementation
from twla_jax.ops.integer_matmul import IntegerWeight
from twla_jax.ops.linear_pair import LinearOperands
from twla_jax.ops.quantized_linear import MOST_TOKENS, quantized_linear
from twla_jax.ops.rotate_quantize import gate, kernel_rotation, quantizer_settings, rotate_quantize
from twla_jax.ops.ternary_matmul import KernelWeight, kernel_weight, ternary_matmul
from twla_jax.ops.tokens import QuantizedTokens
from twla_jax.ops.word_product import WordWeight, word_product

# Most tokens at a time whose 16-bit activations go through the integer kernels, in two parts; beyond, bf16 is faster.
_MOST_WIDE = 64
_kernel_weight = jax.jit(kernel_weight)  # one program for all layers, not one for each of its operations


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewTokens:
    """Tokens that their linear is yet to turn and quantise: `settings` are `quantized_linear`'s.

    Attention in parts, one token a sequence, is for the output linear of a block that `takes_splits`.
    """

    x: Float[Array, "*tokens m"] | AttentionSplits
    settings: dict[str, Any]

    def quantized(self, implementation: Implementation | None) -> QuantizedTokens:
        """Return the tokens as two ops leave them between them."""
        assert not isinstance(self.x, AttentionSplits)
        return rotate_quantize(self.x, implementation=implementation, **self.settings)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ungated:
    """An input that begins a step earlier: a gate's outputs and what they gate, side by side."""

    outputs: Float[Array, "*tokens two_m"]


class KernelInput(nnx.Module):
    """An input of linears: norm, rotation and quantizer as one op.

    Without a quantizer, a few bf16 tokens of ternary linears become codes of 16 bits (`ops.tokens.wide_tokens`), which
    the integer kernels multiply at the speed of 8; else norm and rotation stay in bf16. Of float linears, tokens are
    quantised and stay floats, as the quantiser's own arithmetic has them.
    """

    quantizer: nnx.Param[Any] | None

    def __init__(
        self,
        block: ChainBlock,
        site: Site,
        *,
        norm: RMSNorm | None,
        dtype: jnp.dtype,
        mesh: Mesh | None,
        implementation: Implementation | None,
    ):
        transform = block.transform(site)
        rotation = None if transform.rotation is None else transform.rotation.get_value()
        quantizer = None if transform.activation is None else transform.activation.get_value()
        self.rotation = nnx.data(None if rotation is None else nnx.Param(kernel_rotation(rotation, dtype)))
        self.norm = norm
        kernels = (linear.kernel.get_value() for linear in block.linears(site))
        ternary = all(isinstance(kernel, TernaryTensor) for kernel in kernels)
        settings = _settings(quantizer) if ternary else None
        self.settings = nnx.data(None if settings is None else nnx.Param(settings))
        # Of floats, which meet no codes.
        rounds = not ternary and quantizer is not None and quantizer.enabled
        self.quantizer = nnx.data(nnx.Param(quantizer) if rounds else None)
        self.mesh, self.implementation = mesh, implementation
        narrow = jnp.dtype(dtype) == jnp.bfloat16
        self.wide = settings is None and ternary and narrow and not site.experts
        self.of_experts = site.experts

    @property
    def makes_codes(self) -> bool:
        """Returns whether linears are given integers, at least of a few tokens."""
        return self.settings is not None or self.wide

    @property
    def takes_gate(self) -> bool:
        """Returns whether the op can begin a step earlier, with `Ungated` outputs."""
        return self.makes_codes and self.mesh is None

    def operands(self, linear: "KernelLinear") -> LinearOperands | None:
        """Return operands for a fused op from this input on; None if it is unrotated, or the weight not one plane."""
        if not self.makes_codes or self.rotation is None or linear.plane is None or self.mesh is not None:
            return None
        return LinearOperands(weight=linear.plane, **self._options())

    def _options(self) -> dict[str, Any]:
        """Return what `rotate_quantize` takes of it; not where it makes no codes."""
        assert self.makes_codes
        return {
            "rotation": None if self.rotation is None else self.rotation.get_value(),
            "settings": None if self.settings is None else self.settings.get_value(),
            "norm_scale": None if self.norm is None else self.norm.scale.get_value(),
            "epsilon": 0.0 if self.norm is None else self.norm.epsilon,
        }

    def __call__(
        self, x: Float[Array, "*tokens m"] | AttentionSplits | Ungated
    ) -> QuantizedTokens | FewTokens | Float[Array, "*tokens m"]:
        """Return what the linears read; `Ungated` outputs, only where `takes_gate`, stand for `silu(gate) · up`."""
        gated = isinstance(x, Ungated)
        x = x.outputs if isinstance(x, Ungated) else x
        tokens = 1 if isinstance(x, AttentionSplits) else x.size // x.shape[-1]
        if self.settings is None and not (self.wide and tokens <= _MOST_WIDE):
            assert not isinstance(x, AttentionSplits)
            x = gate(x) if gated else x
            x = x if self.norm is None else self.norm(x)
            x = x if self.rotation is None else rotate(x, *self.rotation.get_value().factors)
            return x if self.quantizer is None else self.quantizer.get_value()(x)
        settings = self._options()
        if isinstance(x, AttentionSplits):
            return FewTokens(x=x, settings=settings)
        few = tokens <= MOST_TOKENS or (self.mesh is not None and self.settings is None)
        if few and not self.of_experts:
            return FewTokens(x=gate(x) if gated else x, settings=settings)
        op = functools.partial(rotate_quantize, gated=gated, implementation=self.implementation, **settings)
        return op(x) if self.mesh is None else tensor_parallel.per_token(op, x, self.mesh)


class KernelLinear(nnx.Module):
    """One or several linears that read the same input, as one matrix; `y` lists their outputs side by side.

    Attributes:
      words: the same weights in fewer bytes, which a single token reads in place of floats; None where there are none.
    """

    words: nnx.Param[WordWeight] | None

    def __init__(
        self,
        block: ChainBlock,
        site: Site,
        *,
        dtype: jnp.dtype,
        mesh: Mesh | None,
        implementation: Implementation | None,
    ):
        linears = block.linears(site)
        kernels = [linear.kernel.get_value() for linear in linears]
        biases = [None if linear.bias is None else linear.bias.get_value() for linear in linears]
        self.bias = self.second_plane = self.words = nnx.data(None)
        self.by_rows = False
        if all(isinstance(kernel, TernaryTensor) for kernel in kernels):
            pack = _kernel_weight
            if mesh is not None:
                pack = functools.partial(tensor_parallel.sharded_weight, mesh=mesh)
            first, *second = zip(*(kernel.planes() for kernel in kernels), strict=True)
            weight = for_kernels(pack(first, biases))
            if second:
                second_plane = for_kernels(pack(second[0], [None] * len(kernels)))
                self.second_plane = nnx.data(nnx.Param(second_plane))
            self.splits = weight.splits
        else:
            weight = jnp.concatenate([jnp.asarray(kernel, dtype) for kernel in kernels], axis=-1)
            self.splits = tuple(kernel.shape[-1] for kernel in kernels)
            # Of one token, XLA on CPUs reads a matrix that lies so in three fifths of the time.
            self.by_rows = mesh is None and jax.default_backend() == "cpu"
            weight = weight.T if self.by_rows else weight
            if known := [bias for bias in biases if bias is not None]:
                self.bias = nnx.data(nnx.Param(jnp.concatenate(known).astype(dtype)))
        self.weight = nnx.Param(weight)
        self.dtype, self.mesh = dtype, mesh
        self.implementation: Implementation | None = implementation

    def __call__(
        self,
        x: QuantizedTokens | FewTokens | Float[Array, "*tokens m"],
        residual: Float[Array, "*tokens n"] | None = None,
        *,
        gated: bool = False,
    ) -> Float[Array, "*tokens n"]:
        """Return `x Ŵᵀ + b` in the model's type, and the residual added; or, of two, `silu(first) · second`."""
        if isinstance(x, FewTokens) and self.mesh is not None:
            return self._split(x, residual, gated=gated)
        if isinstance(x, FewTokens) and (plane := self.plane) is not None:
            y = quantized_linear(
                x.x,
                weight=plane,
                residual=residual,
                gated=gated,
                out_dtype=self.dtype,
                implementation=self.implementation,
                **x.settings,
            )
            return y[:, None] if isinstance(x.x, AttentionSplits) else y
        x = x.quantized(self.implementation) if isinstance(x, FewTokens) else x
        if self.plane is not None and self.mesh is None and not gated:
            options = {"out_dtype": self.dtype, "implementation": self.implementation}
            return ternary_matmul(x, self.plane, residual, **options)
        y = self._outputs(x)
        y = gate(y) if gated else y
        return y if residual is None else residual + y

    @property
    def plane(self) -> KernelWeight | None:
        """Returns the weight, if it is a single ternary plane."""
        weight = self.weight.get_value()
        return weight if isinstance(weight, KernelWeight) and self.second_plane is None else None

    def _outputs(self, x: QuantizedTokens | Float[Array, "*tokens m"]) -> jax.Array:
        weight = self.weight.get_value()
        if isinstance(weight, KernelWeight):
            if self.second_plane is None:
                return self._product(x, weight, self.dtype)
            planes = (weight, self.second_plane.get_value())
            first, second = (self._product(x, plane, jnp.float32) for plane in planes)
            return (first + second).astype(self.dtype)
        assert not isinstance(x, QuantizedTokens)  # which are made for ternary weights alone
        if self.words is not None and x.size == x.shape[-1]:
            y = word_product(x, self.words.get_value()).astype(self.dtype)
        else:
            form = "...m,nm->...n" if self.by_rows else "...m,mn->...n"
            y = jnp.einsum(form, x, weight, precision=precision(self.dtype))
        return y if self.bias is None else y + self.bias.get_value()

    def _split(self, x: FewTokens, residual: jax.Array | None, *, gated: bool) -> jax.Array:
        """Return the outputs of few tokens on a mesh: each device turns and quantises them for its own rows."""
        assert self.mesh is not None
        planes = (
            self.weight.get_value(),
            *(() if self.second_plane is None else [self.second_plane.get_value()]),
        )
        options: dict[str, Any] = {"implementation": self.implementation}

        def op(tokens: jax.Array, planes: tuple[KernelWeight, ...], *added: jax.Array) -> jax.Array:
            if len(planes) == 1:
                more = x.settings | {"gated": gated, "residual": added[0] if added else None}
                return quantized_linear(tokens, weight=planes[0], out_dtype=self.dtype, **more, **options)
            codes = rotate_quantize(tokens, **x.settings, **options)
            y = sum(ternary_matmul(codes, plane, out_dtype=jnp.float32, **options) for plane in planes)
            y = jnp.asarray(y, self.dtype)
            y = gate(y) if gated else y
            return added[0] + y if added else y

        return tensor_parallel.matmul(op, x.x, planes, self.mesh, residual)

    def _product(self, x: Any, weight: KernelWeight, dtype: DTypeLike) -> jax.Array:
        op = functools.partial(ternary_matmul, out_dtype=dtype, implementation=self.implementation)
        return op(x, weight) if self.mesh is None else tensor_parallel.matmul(op, x, weight, self.mesh)

    def parts(
        self, x: QuantizedTokens | FewTokens | Float[Array, "*tokens m"]
    ) -> tuple[Float[Array, "*tokens _"], ...]:
        """Return the outputs of each linear."""
        y = self(x)
        # On a mesh, each device's share of all of them is followed by the next device's.
        shares = y.reshape(*y.shape[:-1], -1, sum(self.splits))
        parts = jnp.split(shares, np.cumsum(self.splits)[:-1], axis=-1)
        return tuple(part.reshape(*y.shape[:-1], -1) for part in parts)


def for_kernels[T: (KernelWeight, IntegerWeight)](weight: T) -> T:
    """Return a weight with scales as the device's kernels take them, so that no step makes a copy of them."""
    return dataclasses.replace(weight, scales=weight.scale_bits) if jax.default_backend() == "tpu" else weight


def _settings(quantizer: ActivationQuantizer | None) -> Float32[Array, " 3"] | None:
    """Return what `rotate_quantize` needs of a quantiser; None if it is off."""
    if quantizer is None or not quantizer.enabled or int(quantizer.bits) >= OFF:
        return None
    return quantizer_settings(quantizer.bits, select_clip(quantizer.clips, quantizer.bits))
