"""Defines Qwen 2 and 3: Llama with biases (2) or norms of queries and keys (3), and windows in some layers."""

from typing import Any

from twla_jax.models.families.family import Family, HfConfig, layer_kinds, sliding_settings
from twla_jax.models.families.llama import GGUF_TENSORS, HF_TENSORS, LlamaBlock

_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _settings2(config: HfConfig, source: str) -> dict[str, Any]:
    return {"qkv_bias": True, **_sliding(config, source)}


def _settings3(config: HfConfig, source: str) -> dict[str, Any]:
    bias = config.get("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, **_sliding(config, source)}


def _sliding(config: HfConfig, source: str) -> dict[str, Any]:
    """Return `sliding_window` and `sliding_layers`: some layers, where switched on."""
    count, kinds = config["num_hidden_layers"], layer_kinds(config, source)
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    if kinds is None:
        layers = range(min(config["max_window_layers"], count), count)
    else:
        layers = [index for index, kind in enumerate(kinds) if kind == "sliding_attention"]
    return sliding_settings(config, window, layers, source)


FAMILIES = {
    "qwen2": Family(
        block=LlamaBlock,
        settings=_settings2,
        defaults=_DEFAULTS,
        hf_tensors=HF_TENSORS,
        gguf_architecture="qwen2",
        gguf_tensors=GGUF_TENSORS,
    ),
    "qwen3": Family(
        block=LlamaBlock,
        settings=_settings3,
        defaults={**_DEFAULTS, "head_dim": 128},
        hf_tensors=HF_TENSORS,
        gguf_architecture="qwen3",
        gguf_tensors=GGUF_TENSORS,
    ),
}
