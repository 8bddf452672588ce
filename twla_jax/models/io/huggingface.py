"""Reads a model folder in Hugging Face layout: `config.json` and one or many safetensors files."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.io.loading import fill_decoder

# Decoder parameter → tensor; {} is the layer.
TENSOR_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
    "blocks.input_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.post_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.q.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.k.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.v.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.o.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks.k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks.v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks.o.bias": "model.layers.{}.self_attn.o_proj.bias",
    "blocks.q_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.k_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.up.kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks.down.kernel": "model.layers.{}.mlp.down_proj.weight",
    "blocks.gate.bias": "model.layers.{}.mlp.gate_proj.bias",
    "blocks.up.bias": "model.layers.{}.mlp.up_proj.bias",
    "blocks.down.bias": "model.layers.{}.mlp.down_proj.bias",
}
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


def read_config(folder: Path) -> DecoderConfig:
    """The settings in `folder/config.json`; TwlaError if absent, not JSON, or of an unsupported architecture."""
    path = folder / "config.json"
    return DecoderConfig.from_hf(_read_json(path), source=str(path))


def load_model(folder: Path, *, dtype=None) -> Decoder:
    """The decoder in `folder`, parameters as numpy arrays in their stored type (float32, float16 or bfloat16).

    Args:
      dtype: what it computes in; float32 if None.
    Raises:
      TwlaError: as `read_config`; a shard is missing or cut short; a tensor cannot be used.
    """
    config = read_config(folder)
    shards = _Shards(folder)
    left_over = {name for name in shards.names() if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        left_over.add(TENSOR_NAMES["head.kernel"])
    return fill_decoder(config, shards, TENSOR_NAMES, ignored=left_over, dtype=dtype)


class _Shards:
    """The safetensors files of a folder as one source; they are mapped, and read tensor by tensor."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._listing = index
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise TwlaError(f"{index}: 'weight_map' is missing")
            self._files = {name: folder / file for name, file in weight_map.items()}
        else:
            self._listing = folder / "model.safetensors"
            if not self._listing.exists():
                raise TwlaError(
                    f"{folder}: neither model.safetensors nor model.safetensors.index.json is there"
                )
            self._files = dict.fromkeys(_open(self._listing).keys(), self._listing)
        self._opened = {path: _open(path) for path in sorted(set(self._files.values()))}
        for name, path in self._files.items():
            if name not in self._opened[path].keys():  # noqa: SIM118 (not a dict)
                raise TwlaError(f"{path}: tensor {name!r}, which {index.name} places here, is missing")

    def names(self):
        return self._files.keys()

    def where(self, name: str) -> str:
        return str(self._files.get(name, self._listing))

    def dtype(self, name: str) -> np.dtype:
        stored = self._opened[self._files[name]].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise TwlaError(
                f"{self.where(name)}: tensor {name!r} is {stored}; supported are {', '.join(_DTYPES)}"
            )
        return _DTYPES[stored]

    def read(self, name: str) -> np.ndarray:
        return self._opened[self._files[name]].get_tensor(name)


def _open(path: Path):
    if not path.exists():
        raise TwlaError(f"{path}: this part of the model is missing")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise TwlaError(f"{path}: cut short, or not a safetensors file ({error})") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TwlaError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise TwlaError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise TwlaError(f"{path}: not a JSON object")
    return content
