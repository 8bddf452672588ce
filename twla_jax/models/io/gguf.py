"""Reads a GGUF file: settings from its metadata, tensors dequantised through the gguf package."""

import functools
from collections.abc import Collection

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig, RopeScaling
from twla_jax.models.decoder import Decoder
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.io.loading import fill_decoder

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say llama

# Decoder parameter → tensor; {} is the layer.
TENSOR_NAMES = {
    "embed": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "head.kernel": "output.weight",
    "blocks.input_norm.scale": "blk.{}.attn_norm.weight",
    "blocks.post_norm.scale": "blk.{}.ffn_norm.weight",
    "blocks.q.kernel": "blk.{}.attn_q.weight",
    "blocks.k.kernel": "blk.{}.attn_k.weight",
    "blocks.v.kernel": "blk.{}.attn_v.weight",
    "blocks.o.kernel": "blk.{}.attn_output.weight",
    "blocks.q.bias": "blk.{}.attn_q.bias",
    "blocks.k.bias": "blk.{}.attn_k.bias",
    "blocks.v.bias": "blk.{}.attn_v.bias",
    "blocks.o.bias": "blk.{}.attn_output.bias",
    "blocks.q_norm.scale": "blk.{}.attn_q_norm.weight",
    "blocks.k_norm.scale": "blk.{}.attn_k_norm.weight",
    "blocks.gate.kernel": "blk.{}.ffn_gate.weight",
    "blocks.up.kernel": "blk.{}.ffn_up.weight",
    "blocks.down.kernel": "blk.{}.ffn_down.weight",
    "blocks.gate.bias": "blk.{}.ffn_gate.bias",
    "blocks.up.bias": "blk.{}.ffn_up.bias",
    "blocks.down.bias": "blk.{}.ffn_down.bias",
}
_ROPE_FACTORS = "rope_freqs.weight"
_FLOATS = {
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def read_config(file: GgufFile) -> DecoderConfig:
    """The settings in the file's metadata; TwlaError if of an unsupported architecture, or if one is missing."""
    source = str(file.path)
    if (parts := file.get("split.count", 1)) > 1:
        raise TwlaError(f"{source}: is one of {parts} parts; merge them with llama-gguf-split first")
    architecture = file.require("general.architecture")
    if architecture not in ARCHITECTURES:
        raise TwlaError(
            f"{source}: architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    get = functools.partial(_prefixed, file.get, architecture)
    require = functools.partial(_prefixed, file.require, architecture)
    if get("expert_count", 0):
        raise TwlaError(
            f"{source}: {architecture} with {get('expert_count')} experts is not supported, only dense models"
        )
    if TENSOR_NAMES["embed"] not in file.tensors:
        raise TwlaError(f"{source}: tensor {TENSOR_NAMES['embed']!r} is missing")
    hidden, heads, layers = (
        require("embedding_length"),
        require("attention.head_count"),
        require("block_count"),
    )
    kv_heads = get("attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise TwlaError(f"{source}: a number of heads that differs between layers is not supported")
    head_dim = get("attention.key_length", hidden // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise TwlaError(f"{source}: rotary positions on a part of the head are not supported")
    window = get("attention.sliding_window")
    bos, ends = file.get("tokenizer.ggml.bos_token_id"), ("eos_token_id", "eot_token_id")
    eos = {file.get(f"tokenizer.ggml.{key}") for key in ends} - {None}

    def has(parameter):
        return TENSOR_NAMES[parameter].format(0) in file.tensors

    return DecoderConfig(
        model_type=architecture,
        vocab_size=int(file.tensors[TENSOR_NAMES["embed"]].shape[0]),
        hidden_size=hidden,
        intermediate_size=require("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=require("attention.layer_norm_rms_epsilon"),
        rope_theta=get("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, architecture),
        max_position_embeddings=require("context_length"),
        tie_word_embeddings=not has("head.kernel"),
        qkv_bias=has("blocks.q.bias"),
        o_bias=has("blocks.o.bias"),
        mlp_bias=has("blocks.gate.bias"),
        qk_norm=has("blocks.q_norm.scale"),
        sliding_window=window,
        sliding_layers=() if window is None else tuple(range(layers)),
        bos_token_id=bos,
        eos_token_ids=tuple(sorted(eos)),
    ).checked(source)


def load_model(file: GgufFile, *, dtype=None) -> Decoder:
    """The decoder in the file, parameters as numpy arrays.

    F32, F16 and BF16 tensors keep their type. Block-quantised ones become float32, or float16 where the decoder
    computes in something narrower than float32 anyway.

    Args:
      dtype: what it computes in; float32 if None.
    Raises:
      TwlaError: as `read_config`; a tensor is missing, has the wrong shape, an unknown type, or is not finite.
    """
    config = read_config(file)
    return fill_decoder(
        config, _Tensors(file, config, dtype), TENSOR_NAMES, ignored={_ROPE_FACTORS}, dtype=dtype
    )


class _Tensors:
    """The file's tensors, dequantised, query and key rows in the order of half-split rotary positions."""

    def __init__(self, file: GgufFile, config: DecoderConfig, dtype):
        self._file = file
        self._blocks_dtype = np.dtype(np.float32 if dtype is None or dtype == jnp.float32 else np.float16)
        self._head_dim = config.head_dim
        # Files of the llama architecture order query and key rows for rotations of neighbouring pairs.
        self._interleaved = ("attn_q.", "attn_k.") if config.model_type == "llama" else ()

    def names(self) -> Collection[str]:
        return self._file.tensors.keys()

    def where(self, name: str) -> str:
        return str(self._file.path)

    def dtype(self, name: str) -> np.dtype:
        return _FLOATS.get(self._file.tensors[name].kind, self._blocks_dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        tensor = self._file.read(name)
        if any(part in name for part in self._interleaved):
            pairs = tensor.reshape(-1, self._head_dim // 2, 2, *tensor.shape[1:])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        return tensor


def _prefixed(getter, architecture: str, key: str, *default):
    return getter(f"{architecture}.{key}", *default)


def _rope_scaling(file: GgufFile, architecture: str) -> RopeScaling | None:
    kind = file.get(f"{architecture}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise TwlaError(
            f"{file.path}: rope scaling {kind!r} is not supported; supported are none, linear and {_ROPE_FACTORS}"
        )
    if _ROPE_FACTORS in file.tensors:
        factors = file.read(_ROPE_FACTORS)
        return RopeScaling(kind="factors", factors=tuple(float(factor) for factor in factors))
    if kind == "linear":
        return RopeScaling(kind="linear", factor=file.require(f"{architecture}.rope.scaling.factor"))
    return None
