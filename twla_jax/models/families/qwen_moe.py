"""Defines Qwen 3 mixtures of experts (30B-A3B, 235B-A22B): Qwen 3 with experts in every layer."""

from collections.abc import Callable, Mapping
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.models.config_keys import MOST_LAYERS
from twla_jax.models.families.family import Family, HfConfig, layer_kinds, sliding_settings
from twla_jax.models.families.moe import (
    EXPERT_KEYS,
    GGUF_EXPERT_TENSORS,
    MoeBlock,
    expert_settings,
    expert_tensors,
)
from twla_jax.schema import boolean, integer, optional, sequence


def _settings(config: HfConfig, source: str) -> dict[str, Any]:
    step, dense = config["decoder_sparse_step"], config.get("mlp_only_layers") or []
    if step != 1 or dense:
        key, value = ("decoder_sparse_step", step) if step != 1 else ("mlp_only_layers", dense)
        raise TwlaError(
            f"{source}: {key} {value}: layers without experts are not supported beside those with"
        )
    bias = config.get("attention_bias", False)
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": True,
        **_windows(config, source),
        **expert_settings(config, source, default=128),
        "intermediate_size": config["moe_intermediate_size"],
        "normalize_routing": config["norm_topk_prob"],
    }


def _windows(config: HfConfig, source: str) -> dict[str, Any]:
    """Return the windows: in all layers, where switched on; transformers reads no other key of them here."""
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    if window is not None and "full_attention" in (layer_kinds(config, source) or []):
        raise TwlaError(f"{source}: layer_types with full layers are not supported for qwen3_moe")
    return sliding_settings(config, window, range(config["num_hidden_layers"]), source)


def _gguf_settings(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": get("expert_count"),
        "experts_per_token": get("expert_used_count"),
        "intermediate_size": get("expert_feed_forward_length", settings["intermediate_size"]),
        "normalize_routing": True,  # as llama.cpp computes this architecture, whatever the original does
    }


FAMILIES = {
    "qwen3_moe": Family(
        block=MoeBlock,
        settings=_settings,
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "max_position_embeddings": 32768,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        keys={
            **EXPERT_KEYS,
            "moe_intermediate_size": integer(1, 2**24),
            "norm_topk_prob": boolean(),
            "decoder_sparse_step": integer(1, MOST_LAYERS),
            "mlp_only_layers": optional(sequence(integer(0, MOST_LAYERS), longest=MOST_LAYERS)),
        },
        hf_tensors=expert_tensors(
            "mlp.gate.weight",
            {name: f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")},
        ),
        gguf_settings=_gguf_settings,
        gguf_architecture="qwen3moe",
        gguf_tensors=GGUF_EXPERT_TENSORS,
    )
}
