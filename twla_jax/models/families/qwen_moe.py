"""Defines Qwen 3 mixtures of experts (30B-A3B, 235B-A22B): Qwen 3 with experts in every layer."""

from collections.abc import Callable, Mapping
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.models.config_keys import MOST_LAYERS
from twla_jax.models.families import qwen
from twla_jax.models.families.family import Family, HfConfig
from twla_jax.models.families.llama import GGUF_TENSORS
from twla_jax.models.families.moe import EXPERT_KEYS, MoeBlock, expert_settings, expert_tensors
from twla_jax.schema import boolean, integer, optional, sequence


def _settings(config: HfConfig, source: str) -> dict[str, Any]:
    step, dense = config["decoder_sparse_step"], config.get("mlp_only_layers") or []
    if step != 1 or dense:
        key, value = ("decoder_sparse_step", step) if step != 1 else ("mlp_only_layers", dense)
        raise TwlaError(
            f"{source}: {key} {value}: layers without experts are not supported beside those with"
        )
    attention = qwen.FAMILIES["qwen3"].settings(config, source)
    return {
        **attention,
        **expert_settings(config, source, default=128),
        "intermediate_size": config["moe_intermediate_size"],
        "normalize_routing": config["norm_topk_prob"],
    }


def _gguf_settings(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": get("expert_count"),
        "experts_per_token": get("expert_used_count"),
        "intermediate_size": get("expert_feed_forward_length", settings["intermediate_size"]),
        "normalize_routing": True,  # as llama.cpp computes this architecture, whatever the original does
    }


_DENSE = {f"blocks.{name}.{leaf}" for name in ("gate", "up", "down") for leaf in ("kernel", "bias")}
_GGUF_TENSORS = {path: name for path, name in GGUF_TENSORS.items() if path not in _DENSE}
_GGUF_TENSORS |= {
    f"blocks.{name}.kernel": f"blk.{{}}.ffn_{name}_exps.weight" for name in ("gate", "up", "down")
}
_GGUF_TENSORS["blocks.router.kernel"] = "blk.{}.ffn_gate_inp.weight"

FAMILIES = {
    "qwen3_moe": Family(
        block=MoeBlock,
        settings=_settings,
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "max_window_layers": 28,
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
        gguf_tensors=_GGUF_TENSORS,
    )
}
