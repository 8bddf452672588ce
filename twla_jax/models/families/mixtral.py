"""Defines Mixtral: Mistral with experts in every layer, whose weights add up to 1."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from twla_jax.models.families import mistral
from twla_jax.models.families.family import Family, HfConfig
from twla_jax.models.families.moe import (
    EXPERT_KEYS,
    GGUF_EXPERT_TENSORS,
    MoeBlock,
    expert_settings,
    expert_tensors,
)
from twla_jax.models.rope_settings import read_rope
from twla_jax.schema import number


def _settings(config: HfConfig, source: str) -> dict[str, Any]:
    attention = mistral.FAMILIES["mistral"].settings(config, source)
    return {**attention, **expert_settings(config, source, default=8), "normalize_routing": True}


def _gguf_settings(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the experts; as llama.cpp computes them, their weights add up to 1."""
    return {
        "num_experts": get("expert_count"),
        "experts_per_token": get("expert_used_count"),
        "normalize_routing": True,
    }


FAMILIES = {
    "mixtral": Family(
        block=MoeBlock,
        settings=_settings,
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2,
        },
        rope=functools.partial(read_rope, theta=1e6),
        keys={**EXPERT_KEYS, "router_jitter_noise": number(0, 1)},
        hf_tensors=expert_tensors(
            "block_sparse_moe.gate.weight",
            {
                "gate": "block_sparse_moe.experts.{}.w1.weight",
                "up": "block_sparse_moe.experts.{}.w3.weight",
                "down": "block_sparse_moe.experts.{}.w2.weight",
            },
        ),
        gguf_settings=_gguf_settings,
        gguf_architecture="llama",
        gguf_tensors=GGUF_EXPERT_TENSORS,
        gguf_interleaved=True,
    )
}
