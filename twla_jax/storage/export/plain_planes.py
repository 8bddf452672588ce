"""Finds what formats of one scale a group can hold: single ternary planes of inputs without rotations."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float16, Int8

from twla_jax.core import packing
from twla_jax.core.tensors import TernaryTensor
from twla_jax.errors import TwlaError
from twla_jax.models.decoder import Decoder
from twla_jax.storage.export.folding import Parameter, parameters

RECIPE = "w1.58-sym"
_LEAST_GROUP = 32  # the smallest that kernels of vLLM and gemlite take


class Plane(NamedTuple):
    """A matrix `[n, m]` that is `scales[i, g]·codes[i, k] + offsets[i, g]` in group g, codes in {-1, 0, 1}."""

    codes: Int8[np.ndarray, "n m"]
    scales: Float16[np.ndarray, "n groups"]
    offsets: Float16[np.ndarray, "n groups"]


def is_linear(parameter: Parameter) -> bool:
    """Return whether a parameter is the kernel of a linear of a block that is quantised: a router's is not."""
    return parameter.site is not None


def require_plain(model: Decoder, format: str, *, offsets: bool = False) -> list[TernaryTensor]:
    """Return the tensors of the blocks' linears, of all layers, if they are all plain planes.

    Args:
      model: quantised.
      format: for messages.
      offsets: whether it has a form for offsets μ.
    Raises:
      TwlaError: one is not; names the recipe whose linears are.
    """
    hint = f"quantise with --recipe {RECIPE}"
    if offsets:
        hint += ", or with rotation = false in a recipe of one plane"
    held = {}
    for parameter in parameters(model):
        if not is_linear(parameter) or parameter.name in held:
            continue
        tensor = parameter.held
        if not isinstance(tensor, TernaryTensor):
            raise TwlaError(f"{format} holds no weights of the kind of {parameter.name}; {hint}")
        if tensor.residual_codes is not None:
            raise TwlaError(f"{format} holds one ternary plane, {parameter.name} has two; {hint}")
        if parameter.rotation is not None:
            raise TwlaError(
                f"{format} rotates no inputs, {parameter.name} was quantised for rotated ones; {hint}"
            )
        if not offsets and tensor.mu is not None and bool((tensor.mu != 0).any()):
            raise TwlaError(f"{format} has no offset μ, {parameter.name} has one; {hint}")
        held[parameter.name] = tensor
    return list(held.values())


def require_no_experts(model: Decoder, format: str) -> None:
    """Refuse mixtures of experts.

    Raises:
      TwlaError: the model is one.
    """
    if model.config.num_experts:
        raise TwlaError(f"{format} is not written for mixtures of experts; give --format hf or safetensors")


def plane(parameter: Parameter, group_size: int) -> Plane:
    """Return codes, scales and offsets of one layer, the latter repeated for groups of `group_size` columns.

    The rows of all experts are one below the other.

    Args:
      parameter: the kernel.
      group_size: columns that share a scale; divides the number of columns, and lies within the tensor's groups.
    """
    tensor = parameter.value
    codes = np.asarray(packing.unpack(tensor.codes, tensor.in_features)).astype(np.int8) - np.int8(1)
    first = jnp.arange(0, tensor.in_features, group_size) // tensor.group_size
    parts = codes, np.asarray(tensor.alpha[..., first]), np.asarray(tensor.offsets()[..., first])
    return Plane(*(part.reshape(-1, part.shape[-1]) for part in parts))


def common_group(tensors: list[TernaryTensor], format: str) -> int:
    """Return the largest group that lies within the groups of all tensors and divides their columns.

    Raises:
      TwlaError: it is smaller than kernels take.
    """
    group = math.gcd(*(math.gcd(tensor.group_size, tensor.in_features) for tensor in tensors))
    if group < _LEAST_GROUP:
        raise TwlaError(
            f"{format} needs groups of {_LEAST_GROUP} columns or a multiple that divides every matrix; "
            f"set weights.group_size to such a number in the recipe {RECIPE}"
        )
    return group
