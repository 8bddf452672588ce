"""A GGUF file for llama.cpp: dequantised to float16, or in its own ternary types where these hold the model exactly."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import FAMILIES, by_gguf_architecture
from twla_jax.models.families.family import Family
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.rope import inverse_frequencies
from twla_jax.storage.export.folding import Parameter, parameters
from twla_jax.storage.export.gguf_ternary import TYPES, TernaryType
from twla_jax.storage.export.gguf_vocabulary import add_vocabulary, check_vocabulary
from twla_jax.storage.export.plain_planes import Plane, is_linear, plane, require_plain

_ROPE_FACTORS = "rope_freqs.weight"
_FILE_TYPE_F16 = 1
_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # whose settings are those written here


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
    ternary = TYPES.get(kind)
    if ternary is not None:
        ternary.require(require_plain(model, ternary.name))
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    if architecture not in _ARCHITECTURES:
        raise TwlaError(f"models of type {config.model_type} cannot be written as GGUF; give --format hf")
    family = FAMILIES[by_gguf_architecture()[architecture]]
    writer = gguf.GGUFWriter(path, architecture)
    _add_settings(writer, config)
    writer.add_file_type(ternary.file_type if ternary else _FILE_TYPE_F16)
    add_vocabulary(writer, tokenizer, config.vocab_size, config.eos_token_ids)
    makers: list[Callable[[], np.ndarray]] = []
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        makers.append(lambda: factors)
    for each in parameters(model):
        name = family.gguf_tensors[each.name].format(each.layer)
        if ternary is not None and is_linear(each):
            # Under a number, since the gguf package need not know the type; the type of the array is not looked at.
            number: Any = ternary.number
            writer.add_tensor_info(name, each.shape, np.dtype(np.float16), ternary.nbytes(each.shape), number)
            makers.append(lambda each=each: _ternary_rows(each, ternary, config, family))
            continue
        dtype = np.dtype(np.float16 if len(each.shape) == 2 else np.float32)
        writer.add_tensor_info(name, each.shape, dtype, math.prod(each.shape) * dtype.itemsize)
        makers.append(lambda each=each, dtype=dtype: _cast(each, dtype, config, family))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in makers:
        writer.write_tensor_data(np.ascontiguousarray(make()))
    writer.close()
    if tokenizer is not None:
        check_vocabulary(GgufFile(path), tokenizer)


def _add_settings(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    sliding = config.sliding_layers if config.sliding_window is not None else ()
    if sliding and len(sliding) != config.num_layers:
        raise TwlaError("llama.cpp has no form for windows in only some layers; give --format hf")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if sliding and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind in ("llama3", "factors"):  # those are a tensor
        return
    if scaling.kind not in ("linear", "yarn") or not scaling.truncate:
        raise TwlaError(f"llama.cpp has no form for rope scaling {scaling.kind!r} here; give --format hf")
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / (1 + 0.1 * math.log(scaling.factor)))
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def _rope_factors(config: DecoderConfig) -> np.ndarray | None:
    """Return what frequencies are divided by, where the rule is not linear."""
    if config.rope_scaling is None or config.rope_scaling.kind not in ("llama3", "factors"):
        return None
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    return (config.rope_theta**-exponents / inverse_frequencies(config)).astype(np.float32)


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
