"""Writes a folder in the format `pack-quantized` of compressed-tensors, 2 bits a weight, for vLLM and transformers."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int8, Int32

from twla_jax.core.tensors import TernaryTensor
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
_PER_WORD = 32 // _BITS
_DTYPE = "float16"  # that of the scales, so that they stay exact


def write(
    model: Decoder, tokenizer: "PreTrainedTokenizerBase | None", folder: Path, *, files: Mapping[str, bytes]
) -> None:
    """Fill `folder` with packed linears and all else in float16; what it says of the linears is exact.

    Raises:
      TwlaError: the linears have offsets, a second plane or rotated inputs, or groups that the format cannot hold.
    """
    require_no_experts(model, "compressed-tensors")
    config = hf_config(model.config, _DTYPE)
    tensors = require_plain(model, "compressed-tensors")
    family = family_of(model.config)
    if family.hf_fused or family.hf_norms_less_one:
        raise TwlaError(
            f"models of type {model.config.model_type} are not written as compressed-tensors; give --format hf"
        )
    group_size = common_group(tensors, "compressed-tensors")
    config |= {"quantization_config": _scheme(tensors, group_size)}
    written: list[Tensor] = []
    for each in parameters(model):
        name = published_name(each, model.config)
        if not is_linear(each):
            written.append(
                Tensor(name, DTYPES[_DTYPE], each.shape, functools.partial(cast, each, _DTYPE, name))
            )
            continue
        (n, m), stem = each.shape, name.removesuffix("weight")
        words, groups = -(-m // _PER_WORD), m // group_size
        parts = (
            ("weight_packed", np.int32, (n, words), functools.partial(_packed, each, group_size)),
            ("weight_scale", np.float16, (n, groups), functools.partial(_scales, each, group_size)),
            ("weight_shape", np.int64, (2,), functools.partial(np.asarray, each.shape, np.int64)),
        )
        written += [Tensor(f"{stem}{key}", np.dtype(dtype), shape, make) for key, dtype, shape, make in parts]
    safetensors_file.write_model(folder, written)
    write_settings(folder, config, tokenizer, files)


def pack_int32(codes: Int8[np.ndarray, "n m"]) -> Int32[np.ndarray, "n words"]:
    """Return codes in {-2, …, 1} as unsigned 2-bit fields `code + 2`, sixteen a word, lowest bits first."""
    fields = (codes.astype(np.int64) + 2 ** (_BITS - 1)).astype(np.uint32)
    fields = np.pad(fields, ((0, 0), (0, -fields.shape[1] % _PER_WORD)))
    shifts = np.arange(_PER_WORD, dtype=np.uint32) * np.uint32(_BITS)
    words = np.bitwise_or.reduce(fields.reshape(len(codes), -1, _PER_WORD) << shifts, axis=-1)
    return words.view(np.int32)


def _packed(parameter: Parameter, group_size: int) -> np.ndarray:
    return pack_int32(plane(parameter, group_size).codes)


def _scales(parameter: Parameter, group_size: int) -> np.ndarray:
    return plane(parameter, group_size).scales


def _scheme(tensors: list[TernaryTensor], group_size: int) -> dict[str, Any]:
    whole_rows = all(tensor.in_features == group_size for tensor in tensors)
    weights = {
        "num_bits": _BITS,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "channel" if whole_rows else "group",
        "group_size": None if whole_rows else group_size,
        "actorder": None,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
