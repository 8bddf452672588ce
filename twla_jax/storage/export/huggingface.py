"""A Hugging Face folder of the quantised model, dequantised: rotations folded back into the weights."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import family_of
from twla_jax.models.io.tokenizer import save_tokenizer
from twla_jax.storage.export import safetensors_file
from twla_jax.storage.export.folding import Parameter, parameters
from twla_jax.storage.export.hf_config import hf_config
from twla_jax.storage.export.safetensors_file import Tensor

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def write(
    model: Decoder, tokenizer: Any, folder: Path, *, dtype: str = "bfloat16", files: Mapping[str, bytes]
) -> None:
    """Fill `folder` with weights in `dtype`, `config.json`, the tokenizer and `files`.

    Activations are left at 16 bits: transformers has no quantiser like this library's.

    Raises:
      TwlaError: transformers has no class for the model's settings, or a weight is too large for float16.
    """
    config = hf_config(model.config, dtype)
    tensors = [
        Tensor(name, DTYPES[dtype], each.shape, functools.partial(cast, each, dtype, name))
        for name, each in ((published_name(each, model.config), each) for each in parameters(model))
    ]
    safetensors_file.write_model(folder, tensors)
    write_settings(folder, config, tokenizer, files)


def write_settings(
    folder: Path, config: Mapping[str, Any] | None, tokenizer: Any, files: Mapping[str, bytes]
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
    return family_of(config).hf_tensors[parameter.name].format(parameter.layer)


def cast(parameter: Parameter, dtype: str, name: str) -> np.ndarray:
    """Return the dense parameter in `dtype`.

    Raises:
      TwlaError: a value is out of its range.
    """
    dense = parameter.dense()
    with np.errstate(over="ignore"):
        narrow = dense.astype(DTYPES[dtype])
    if not np.isfinite(narrow).all():
        raise TwlaError(f"{name} holds values that {dtype} cannot; give --dtype float32")
    return narrow
