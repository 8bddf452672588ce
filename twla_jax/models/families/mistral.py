"""Defines Mistral: Llama with a sliding window in every layer; GGUF files call it llama."""

from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.models.families.family import Family, HfConfig, layer_kinds, sliding_settings
from twla_jax.models.families.llama import HF_TENSORS, LlamaBlock


def _settings(config: HfConfig, source: str) -> dict[str, Any]:
    if config.get("attention_bias"):
        raise TwlaError(f"{source}: attention_bias is not supported for mistral")
    if "full_attention" in (layer_kinds(config, source) or []) and config.get("sliding_window") is not None:
        raise TwlaError(f"{source}: layer_types with full layers are not supported for mistral")
    layers = range(config["num_hidden_layers"])
    return sliding_settings(config, config.get("sliding_window"), layers, source)


FAMILIES = {
    "mistral": Family(
        block=LlamaBlock,
        settings=_settings,
        defaults={
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        hf_tensors=HF_TENSORS,
    )
}
