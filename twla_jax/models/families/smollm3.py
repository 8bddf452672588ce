"""Defines SmolLM3: Llama in which some layers, every fourth by default, have no rotary positions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.models.config_keys import MOST_LAYERS
from twla_jax.models.families.family import Family, HfConfig, layer_kinds, sliding_settings
from twla_jax.models.families.llama import GGUF_TENSORS, HF_TENSORS, LlamaBlock
from twla_jax.models.rope_settings import read_rope
from twla_jax.schema import integer, optional, sequence


def _settings(config: HfConfig, source: str) -> dict[str, Any]:
    count, bias, kinds = config["num_hidden_layers"], config["attention_bias"], layer_kinds(config, source)
    rotates = config.get("no_rope_layers")  # despite its name, 1 where there are rotary positions
    if rotates is None:
        rotates = [int((index + 1) % config["no_rope_layer_interval"] != 0) for index in range(count)]
    if len(rotates) != count:
        raise TwlaError(f"{source}: no_rope_layers has {len(rotates)} entries for {count} layers")
    window = config.get("sliding_window") if config["use_sliding_window"] else None
    if kinds is None:
        layers = [index for index in range(count) if not rotates[index]]
    else:
        layers = [index for index, kind in enumerate(kinds) if kind == "sliding_attention"]
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": config["mlp_bias"],
        "no_rope_layers": tuple(index for index in range(count) if not rotates[index]),
        **sliding_settings(config, window, layers, source),
    }


def _gguf_settings(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp takes for granted of this architecture: every fourth layer has no rotary positions."""
    return {"no_rope_layers": tuple(range(3, settings["num_layers"], 4))}


FAMILIES = {
    "smollm3": Family(
        block=LlamaBlock,
        settings=_settings,
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        keys={
            "no_rope_layers": optional(sequence(integer(0, 1), longest=MOST_LAYERS)),
            "no_rope_layer_interval": integer(1, MOST_LAYERS),
        },
        rope=functools.partial(read_rope, theta=2e6),
        hf_tensors=HF_TENSORS,
        gguf_architecture="smollm3",
        gguf_tensors=GGUF_TENSORS,
        gguf_settings=_gguf_settings,
        gguf_interleaved=True,
    )
}
