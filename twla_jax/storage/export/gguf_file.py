"""Writes a GGUF file for llama.cpp: dequantised to float16, or in its ternary types where they hold it exactly."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import FAMILIES
from twla_jax.models.families.family import Family
from twla_jax.models.io.gguf import read_config
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.rope import inverse_frequencies
from twla_jax.storage.export import hf_families
from twla_jax.storage.export.folding import Parameter, parameters
from twla_jax.storage.export.gguf_settings import add_settings, rope_tables
from twla_jax.storage.export.gguf_ternary import TYPES, TernaryType
from twla_jax.storage.export.gguf_vocabulary import add_vocabulary, check_vocabulary
from twla_jax.storage.export.plain_planes import Plane, is_linear, plane, require_plain

_FILE_TYPE_F16 = 1
# Families whose files call them by another's name.
_AS = {"mistral": "llama", "olmo3": "olmo2"}


def write(model: Decoder, tokenizer: Any, path: Path, *, kind: str = "f16") -> None:
    """Write the model to `path`: matrices in float16 with rotations folded back, norms and biases in float32.

    Args:
      model: quantised.
      tokenizer: of the model; None for none.
      path: of the file.
      kind: `f16`, or one of `gguf_ternary.TYPES` for the linears of blocks, which it holds exactly.
    Raises:
      TwlaError: llama.cpp has no form for the model's settings or its tokenizer, or a weight is too large for float16,
        or `kind` cannot hold the linears.
    """
    config = model.config
    if config.model_type not in hf_families.FAMILIES:
        raise TwlaError(f"models of type {config.model_type} cannot be written as GGUF")
    family = FAMILIES[_AS.get(config.model_type, config.model_type)]
    if family.gguf_architecture is None:
        raise TwlaError(f"models of type {config.model_type} are not written as GGUF; give --format hf")
    ternary = TYPES.get(kind)
    if ternary is not None:
        ternary.require(require_plain(model, ternary.name))
    writer = gguf.GGUFWriter(path, family.gguf_architecture)
    add_settings(writer, config)
    writer.add_file_type(ternary.file_type if ternary else _FILE_TYPE_F16)
    add_vocabulary(writer, tokenizer, config.vocab_size, config.eos_token_ids)
    tables = rope_tables(config)
    for name, table in tables.items():
        writer.add_tensor_info(name, table.shape, table.dtype, table.nbytes)
    makers: list[Callable[[], np.ndarray]] = [lambda table=table: table for table in tables.values()]
    for name, parts in _stored(model, family):
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        if ternary is not None and is_linear(parts[0]):
            # Under a number, since the gguf package need not know the type; the type of the array is not looked at.
            number: Any = ternary.number
            writer.add_tensor_info(name, shape, np.dtype(np.float16), ternary.nbytes(shape), number)
            make = functools.partial(_ternary_rows, kind=ternary, config=config, family=family)
        else:
            # A router decides between experts: its matrix is as llama.cpp's own converter writes it.
            matrix = len(shape) > 1 and not parts[0].name.startswith("blocks.router.")
            dtype = np.dtype(np.float16 if matrix else np.float32)
            writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)
            make = functools.partial(_cast, dtype=dtype, config=config, family=family)
        makers.append(lambda make=make, parts=parts: np.concatenate([make(part) for part in parts]))
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for make in makers:
            writer.write_tensor_data(np.ascontiguousarray(make()))
    try:
        written = GgufFile(path)
    except TwlaError:  # the package passes over an error at the very end
        raise OSError("it came out shorter than what was written to it") from None
    _check_settings(read_config(written), config)
    if tokenizer is not None:
        check_vocabulary(written, tokenizer)


def _stored(model: Decoder, family: Family) -> Iterator[tuple[str, list[Parameter]]]:
    """Yield the name of every tensor of the file with the parameters that it holds, one above the other."""
    fused = {part: (whole, parts) for whole, parts in family.gguf_fused.items() for part in parts}
    waiting: dict[str, dict[str, Parameter]] = {}
    for each in parameters(model):
        name = family.gguf_tensors[each.name].format(each.layer)
        stem, _, kind = name.rpartition(".")
        front, _, part = stem.rpartition(".")
        if part not in fused or not front:
            yield name, [each]
            continue
        whole, parts = fused[part]
        held = waiting.setdefault(f"{front}.{whole}.{kind}", {})
        held[part] = each
        if len(held) == len(parts):
            yield f"{front}.{whole}.{kind}", [held[part] for part in parts]


def _check_settings(found: DecoderConfig, config: DecoderConfig) -> None:
    """Refuse a file that llama.cpp would compute something else from.

    Raises:
      TwlaError: settings that decide the forward pass were read back as others.
    """
    if config.model_type == "mistral":
        found = dataclasses.replace(found, model_type="mistral")
    same = {"rope_scaling": config.rope_scaling, "bos_token_id": None, "eos_token_ids": ()}
    held, again = (
        dataclasses.replace(each, rotary_dim=each.rotary_dim or each.head_dim, **same).to_dict()
        for each in (config, found)
    )
    for key, value in held.items():
        close = isinstance(value, float) and math.isclose(value, again[key] or 0.0, rel_tol=1e-6)
        if not close and value != again[key]:
            raise TwlaError(
                f"llama.cpp takes {again[key]} for {key} of {config.model_type}, not {value}; give --format hf"
            )
    if not np.allclose(inverse_frequencies(found), inverse_frequencies(config), rtol=1e-5):
        raise TwlaError("llama.cpp has no form for these rotary positions; give --format hf")


def _ternary_rows(parameter: Parameter, kind: TernaryType, config: DecoderConfig, family: Family) -> Any:
    held = plane(parameter, kind.block)
    parts = (_interleaved(parameter.name, part, config, family) for part in held)
    return kind.rows(Plane(*parts))


def _cast(parameter: Parameter, dtype: np.dtype, config: DecoderConfig, family: Family) -> np.ndarray:
    dense = _interleaved(parameter.name, parameter.dense(), config, family)
    with np.errstate(over="ignore"):
        narrow = dense.astype(dtype)
    if not np.isfinite(narrow).all():
        raise TwlaError(f"{parameter.name} holds values that float16 cannot; give --format hf")
    return narrow


def _interleaved(name: str, rows: np.ndarray, config: DecoderConfig, family: Family) -> np.ndarray:
    """Return query and key rows in the order in which llama.cpp rotates neighbouring pairs."""
    if not family.gguf_interleaved or name.split(".")[1:2] not in (["q"], ["k"]):
        return rows
    halves = rows.reshape(-1, 2, config.head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
