"""Writes a Hugging Face folder of the quantised model, dequantised: rotations folded back into the weights."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import family_of
from twla_jax.models.families.family import Family
from twla_jax.models.io.tokenizer import save_tokenizer
from twla_jax.storage.export import safetensors_file
from twla_jax.storage.export.folding import Parameter, parameters
from twla_jax.storage.export.hf_config import hf_config
from twla_jax.storage.export.safetensors_file import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def write(
    model: Decoder,
    tokenizer: "PreTrainedTokenizerBase | None",
    folder: Path,
    *,
    dtype: str = "bfloat16",
    files: Mapping[str, bytes],
) -> None:
    """Fill `folder` with weights in `dtype`, `config.json`, the tokenizer and `files`.

    Activations are left at 16 bits: transformers has no quantiser like this library's.

    Raises:
      TwlaError: transformers has no class for the model's settings, or a weight is too large for float16.
    """
    config = hf_config(model.config, dtype)
    safetensors_file.write_model(folder, _tensors(model, dtype))
    write_settings(folder, config, tokenizer, files)


def _tensors(model: Decoder, dtype: str) -> list[Tensor]:
    """Return the tensors as the family publishes them: some fused, norms of some as what they differ from 1 by."""
    family = family_of(model.config)
    joined = _joined(family)
    tensors: list[Tensor] = []
    waiting: dict[str, dict[str, Tensor]] = {}
    for each in parameters(model, family.hf_tensors):
        name = published_name(each, model.config)
        less_one = family.hf_norms_less_one and name.endswith("norm.weight")
        make = functools.partial(cast, each, dtype, name, less=1.0 if less_one else 0.0)
        tensor = Tensor(name, DTYPES[dtype], each.shape, make)
        if family.hf_alternating and each.site is not None and each.site.experts:
            tensor = _inputs_first(tensor)
        part = next((part for part in name.split(".")[-2:] if part in joined), None)
        if part is None:
            tensors.append(tensor)
            continue
        whole, order, join = joined[part]
        parts = waiting.setdefault(name.replace(part, whole), {})
        parts[part] = tensor
        if len(parts) == len(order):
            tensors.append(join(name.replace(part, whole), [parts[each] for each in order]))
    return tensors


_Join = Callable[[str, Sequence[Tensor]], Tensor]


def _joined(family: Family) -> dict[str, tuple[str, Sequence[str], _Join]]:
    """Return, for each part of a published tensor, that tensor's name, those of its parts, and how they are joined."""
    joined: dict[str, tuple[str, Sequence[str], _Join]] = {}
    for whole, parts in family.hf_fused.items():
        joined |= dict.fromkeys(parts, (whole, parts, _stacked))
    for whole, pair in family.hf_alternating.items():
        for ending in ("", "_bias"):
            parts = [f"{part}{ending}" for part in pair]
            joined |= dict.fromkeys(parts, (f"{whole}{ending}", parts, _alternating))
    return joined


def _stacked(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Return one tensor of the rows of several."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Tensor(name, parts[0].dtype, shape, lambda: np.concatenate([part.make() for part in parts]))


def _alternating(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Return one tensor of the columns of several, taken in turn."""
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    make = functools.partial(np.stack, axis=-1)
    return Tensor(name, parts[0].dtype, shape, lambda: make([part.make() for part in parts]).reshape(shape))


def _inputs_first(tensor: Tensor) -> Tensor:
    """Return a tensor of experts' matrices turned over, `[experts, in, out]`."""
    shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1])
    return tensor._replace(shape=shape, make=lambda: tensor.make().swapaxes(1, 2))


def write_settings(
    folder: Path,
    config: Mapping[str, Any] | None,
    tokenizer: "PreTrainedTokenizerBase | None",
    files: Mapping[str, bytes],
) -> None:
    """Write `config.json` (where there is a `config`), the tokenizer's files and `files`."""
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def published_name(parameter: Parameter, config: DecoderConfig) -> str:
    """Return the name of a parameter in Hugging Face files of the family."""
    return family_of(config).hf_tensors[parameter.name].format(parameter.layer, parameter.expert)


def cast(parameter: Parameter, dtype: str, name: str, *, less: float = 0.0) -> np.ndarray:
    """Return the dense parameter, less a number, in `dtype`.

    Raises:
      TwlaError: a value is out of its range.
    """
    dense = parameter.dense()
    dense = dense - np.float32(less) if less else dense
    with np.errstate(over="ignore"):
        narrow = dense.astype(DTYPES[dtype])
    if not np.isfinite(narrow).all():
        raise TwlaError(f"{name} holds values that {dtype} cannot; give --dtype float32")
    return narrow
