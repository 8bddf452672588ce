"""Writes a folder of 2-bit linears in the form in which the hqq package saves its own: offsets μ become zero points.

A group of a ternary plane is `α·T + μ = (q − z)·α` with `q = T + 1` in {0, 1, 2} and the zero point `z = 1 − μ/α`,
which hqq keeps as a number, not an integer.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from twla_jax.errors import TwlaError
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import family_of
from twla_jax.storage.export import safetensors_file
from twla_jax.storage.export.folding import Parameter, parameters
from twla_jax.storage.export.hf_config import hf_config
from twla_jax.storage.export.huggingface import DTYPES, cast, published_name, write_settings
from twla_jax.storage.export.plain_planes import (
    common_group,
    is_linear,
    plane,
    require_no_experts,
    require_plain,
)
from twla_jax.storage.export.safetensors_file import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BITS = 2
_FIELDS = 8 // _BITS  # codes a byte
_DTYPE = "float16"  # of all but the linears
# What `HQQLinear.state_dict` says beside the arrays, in the form in which it says it.
_TRUE, _FALSE = np.uint8(1), np.uint8(0)
_SAME_FOR_ALL: dict[str, Any] = {
    "nbits": np.int32(_BITS),
    "axis": np.int32(1),
    "packing": np.frombuffer(b"2bit_u8", np.uint8),
    "unpack_view_dtype": np.frombuffer(b"torch.uint8", np.uint8),
    "compute_dtype": np.frombuffer(b"torch.float32", np.uint8),
    "view_as_float": _FALSE,
    "quant_scale": _FALSE,
    "quant_zero": _FALSE,
    "offload_meta": _FALSE,
    "encoded_state_dict": _TRUE,
    "stores_quant_config": _TRUE,
    "channel_wise": _TRUE,
    "optimize": _FALSE,
    "round_zero": _FALSE,
}


class Groups(NamedTuple):
    """A matrix whose groups, in the order of its rows, are `(unpack(codes) − zero)·scale`."""

    codes: UInt8[np.ndarray, "bytes group"]
    scale: Float32[np.ndarray, "groups 1"]
    zero: Float32[np.ndarray, "groups 1"]


def write(
    model: Decoder, tokenizer: "PreTrainedTokenizerBase | None", folder: Path, *, files: Mapping[str, bytes]
) -> None:
    """Fill `folder` with packed linears, scales and zero points in float32, and all else in float16.

    Raises:
      TwlaError: the linears have a second plane or rotated inputs, or groups that the format cannot hold.
    """
    require_no_experts(model, "hqq")
    tensors = require_plain(model, "hqq", offsets=True)
    family = family_of(model.config)
    if family.hf_fused or family.hf_norms_less_one:
        raise TwlaError(f"models of type {model.config.model_type} are not written as hqq; give --format hf")
    group_size = common_group(tensors, "hqq")
    config = hf_config(model.config, _DTYPE) | {"quantization_config": _scheme(group_size)}
    written: list[Tensor] = []
    for each in parameters(model):
        name = published_name(each, model.config)
        if is_linear(each):
            written += _linear(each, name.removesuffix("weight"), group_size)
        else:
            make = functools.partial(cast, each, _DTYPE, name)
            written.append(Tensor(name, DTYPES[_DTYPE], each.shape, make))
    safetensors_file.write_model(folder, written)
    write_settings(folder, config, tokenizer, files)


def _linear(parameter: Parameter, stem: str, group_size: int) -> list[Tensor]:
    (n, m), groups = parameter.shape, parameter.shape[0] * parameter.shape[1] // group_size
    if groups % _FIELDS:
        raise TwlaError(f"hqq packs four groups a byte, {parameter.name} has {groups}; give --format hf")
    shapes = {"W_q": (groups // _FIELDS, group_size), "scale": (groups, 1), "zero": (groups, 1)}
    parts = [
        Tensor(
            f"{stem}{key}",
            np.dtype(np.uint8 if key == "W_q" else np.float32),
            shape,
            functools.partial(_part, parameter, group_size, index),
        )
        for index, (key, shape) in enumerate(shapes.items())
    ]
    told = _SAME_FOR_ALL | {"group_size": np.int32(group_size), "shape": np.asarray((n, m), np.int64)}
    return parts + [
        Tensor(f"{stem}{key}", value.dtype, value.shape, functools.partial(np.asarray, value))
        for key, value in told.items()
    ]


def _part(parameter: Parameter, group_size: int, index: int) -> np.ndarray:
    held = plane(parameter, group_size)
    return pack(held.codes, held.scales, held.offsets)[index]


def pack(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> Groups:
    """Return the groups of `[n, m]` codes in {-1, 0, 1}, with α and μ `[n, groups]`.

    A byte holds the codes of four groups a quarter of all apart, those of the first quarter in its highest bits. Where
    α is 0, all codes are 0 and all weights μ, which a scale of 1 leaves as it is.
    """
    group_size = codes.shape[1] // scales.shape[1]
    alpha, mu = (each.reshape(-1, 1).astype(np.float64) for each in (scales, offsets))
    fields = (codes + 1).astype(np.uint8).reshape(-1, group_size)
    fields = np.where(alpha == 0, np.uint8(0), fields)
    scale = np.where(alpha == 0, 1.0, alpha)
    zero = np.where(alpha == 0, -mu, 1 - mu / scale)
    quarters = fields.reshape(_FIELDS, -1, group_size)
    packed = functools.reduce(lambda byte, quarter: byte << _BITS | quarter, quarters)
    return Groups(packed.astype(np.uint8), scale.astype(np.float32), zero.astype(np.float32))


def _scheme(group_size: int) -> dict[str, Any]:
    weights = {
        "nbits": _BITS,
        "group_size": group_size,
        "axis": 1,
        "channel_wise": True,
        "optimize": False,
        "round_zero": False,
        "view_as_float": False,
    }
    settings = {
        "weight_quant_params": weights,
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }
    return {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]}
