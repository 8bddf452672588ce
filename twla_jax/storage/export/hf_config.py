"""The `config.json` of a decoder: what `config_from_hf` reads, the other way round."""

from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.rope_settings import RopeScaling

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def hf_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Return the settings as transformers 4 and 5 read them.

    Args:
      config: of the model.
      dtype: of the weights beside it, `bfloat16`.
    Raises:
      TwlaError: transformers has no class for these settings.
    """
    family = config.model_type
    # GGUF files of Mistral say llama, whose class in transformers has no window.
    if family == "llama" and config.sliding_window is not None:
        family = "mistral"
    if family not in _CLASSES:
        raise TwlaError(f"models of type {config.model_type} cannot be written as a Hugging Face folder")
    eos = list(config.eos_token_ids)
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "use_cache": True,
        "torch_dtype": dtype,
        **_rope(config.rope_scaling, config),
        **_biases(config, family),
        **_windows(config, family),
    }


def _biases(config: DecoderConfig, family: str) -> dict[str, Any]:
    qkv, o, mlp = config.qkv_bias, config.o_bias, config.mlp_bias
    expressible = {
        "llama": qkv == o,
        "mistral": not (qkv or o or mlp),
        "qwen2": qkv and not (o or mlp),
        "qwen3": qkv == o and not mlp,
    }[family]
    if not expressible or config.qk_norm != (family == "qwen3"):
        raise TwlaError(f"transformers has no {family} with the biases or norms of this model; export gguf")
    settings = {"attention_bias": qkv} if family in ("llama", "qwen3") else {}
    return settings | ({"mlp_bias": mlp} if family == "llama" else {})


def _windows(config: DecoderConfig, family: str) -> dict[str, Any]:
    if family == "llama":
        return {}
    if family == "mistral":
        if config.sliding_window is not None and len(config.sliding_layers) != config.num_layers:
            raise TwlaError(
                "transformers has no mistral in which only some layers have a window; export gguf"
            )
        return {"sliding_window": config.sliding_window}
    sliding = set(config.sliding_layers if config.sliding_window is not None else ())
    kinds = ("full_attention", "sliding_attention")
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": config.sliding_window,
        "max_window_layers": min(sliding, default=config.num_layers),
        "layer_types": [kinds[layer in sliding] for layer in range(config.num_layers)],
    }


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
