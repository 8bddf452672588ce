"""Writes the `config.json` of a decoder: what `config_from_hf` reads, the other way round."""

import dataclasses
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.rope_settings import RopeScaling
from twla_jax.storage.export.hf_families import FAMILIES


def hf_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Return the settings as transformers 4 and 5 read them.

    Args:
      config: of the model.
      dtype: of the weights beside it, `bfloat16`.
    Raises:
      TwlaError: transformers has no class for these settings.
    """
    # GGUF files of Mistral say llama, whose class in transformers has no window.
    if config.model_type == "llama" and config.sliding_window is not None:
        config = dataclasses.replace(config, model_type="mistral")
    if config.model_type not in FAMILIES:
        raise TwlaError(f"models of type {config.model_type} cannot be written as a Hugging Face folder")
    family = FAMILIES[config.model_type]
    eos = list(config.eos_token_ids)
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": family.activation,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "use_cache": True,
        "torch_dtype": dtype,
        **_rope_keys(config, layered=family.layered),
        **family.keys(config),
    }


def _rope_keys(config: DecoderConfig, *, layered: bool) -> dict[str, Any]:
    """Return the rotary settings as transformers 4 and 5 read them, for all layers or by kind of layer."""
    common = {"rope_theta": config.rope_theta}
    if config.rotary_dim is not None:
        common["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    stated = _rope(config.rope_scaling, config)
    if not layered:
        if stated["rope_scaling"] is not None:
            stated["rope_scaling"] |= common
        return {**common, **stated}
    full = {"rope_type": "default", **(stated.pop("rope_scaling") or {}), **common}
    sliding = {"rope_type": "default", "rope_theta": config.sliding_rope_theta or config.rope_theta}
    return {**stated, "rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def _rope(scaling: RopeScaling | None, config: DecoderConfig) -> dict[str, Any]:
    if scaling is None:
        return {"rope_scaling": None}
    settings: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": config.rope_theta}
    original = {"original_max_position_embeddings": scaling.original_max_position_embeddings}
    if scaling.kind in ("linear", "llama3", "yarn"):
        settings["factor"] = scaling.factor
    if scaling.kind == "llama3":
        bands = {key: getattr(scaling, key) for key in ("low_freq_factor", "high_freq_factor")}
        settings |= bands | original
    elif scaling.kind == "yarn":
        keys = ("attention_factor", "beta_fast", "beta_slow", "truncate")
        settings |= {key: getattr(scaling, key) for key in keys} | original
    elif scaling.kind == "longrope":
        settings |= {"short_factor": list(scaling.factors), "long_factor": list(scaling.long_factors)}
        settings |= {"factor": scaling.factor, "attention_factor": scaling.attention_factor} | original
        return {"rope_scaling": settings, **original}
    elif scaling.kind == "factors":  # GGUF's form of the llama3 rule: the same factors at every length
        factors = list(scaling.factors)
        settings |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        whole = {"original_max_position_embeddings": config.max_position_embeddings}
        settings |= {"factor": 1.0, "attention_factor": 1.0} | whole
        return {"rope_scaling": settings, **whole}
    elif scaling.kind != "linear":
        raise TwlaError(f"rope scaling {scaling.kind!r} cannot be written to a config.json")
    return {"rope_scaling": settings}
