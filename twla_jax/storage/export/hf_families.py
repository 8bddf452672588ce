"""Gives what each family's `config.json` says beside the common keys: the inverse of `Family.settings`.

Each function returns a family's own keys for a decoder's settings, and refuses those that its class in transformers
cannot have.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig

_KINDS = ("full_attention", "sliding_attention")


def require(possible: bool, config: DecoderConfig, what: str = "the biases or norms of this model") -> None:
    """Refuse settings that the family's class cannot have.

    Raises:
      TwlaError: it cannot; names the family and what it lacks.
    """
    if not possible:
        raise TwlaError(f"transformers has no {config.model_type} with {what}; export gguf")


def _layer_types(config: DecoderConfig) -> list[str]:
    sliding = set(config.sliding_layers if config.sliding_window is not None else ())
    return [_KINDS[layer in sliding] for layer in range(config.num_layers)]


def _llama(config: DecoderConfig) -> dict[str, Any]:
    require(config.qkv_bias == config.o_bias and not config.qk_norm, config)
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _mistral(config: DecoderConfig) -> dict[str, Any]:
    require(not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm), config)
    return _one_window(config)


def _one_window(config: DecoderConfig) -> dict[str, Any]:
    some = config.sliding_window is not None and len(config.sliding_layers) != config.num_layers
    require(not some, config, "windows in only some layers")
    return {"sliding_window": config.sliding_window}


def _qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    sliding = config.sliding_layers if config.sliding_window is not None else ()
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": config.sliding_window,
        "max_window_layers": min(sliding, default=config.num_layers),
        "layer_types": _layer_types(config),
    }


def _qwen2(config: DecoderConfig) -> dict[str, Any]:
    require(config.qkv_bias and not (config.o_bias or config.mlp_bias or config.qk_norm), config)
    return _qwen_windows(config)


def _qwen3(config: DecoderConfig) -> dict[str, Any]:
    require(config.qkv_bias == config.o_bias and not config.mlp_bias and config.qk_norm, config)
    return {"attention_bias": config.qkv_bias, **_qwen_windows(config)}


def _smollm3(config: DecoderConfig) -> dict[str, Any]:
    rotates = [int(layer not in config.no_rope_layers) for layer in range(config.num_layers)]
    windows = {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    }
    return {**_llama(config), "no_rope_layers": rotates, **windows}


def _granite(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_llama(config),
        "embedding_multiplier": config.embed_scale,
        "logits_scaling": 1.0 / config.logit_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.query_scale / config.head_dim**0.5,
    }


def _gemma(config: DecoderConfig) -> dict[str, Any]:
    require(config.qkv_bias == config.o_bias and not config.mlp_bias, config)
    require(abs(config.embed_scale / config.hidden_size**0.5 - 1) < 1e-6, config, "this scale of embeddings")
    scalar = config.head_dim / config.query_scale**2
    return {
        "attention_bias": config.qkv_bias,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attention_softcap,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    }


def _olmo2(config: DecoderConfig) -> dict[str, Any]:
    require(config.qkv_bias == config.o_bias and not config.mlp_bias, config)
    return {"attention_bias": config.qkv_bias}


def _olmo3(config: DecoderConfig) -> dict[str, Any]:
    windows = {"sliding_window": config.sliding_window, "layer_types": _layer_types(config)}
    return {**_olmo2(config), **windows}


def _phi3(config: DecoderConfig) -> dict[str, Any]:
    require(config.head_dim * config.num_heads == config.hidden_size, config, "heads of this size")
    return _mistral(config)


def _mixtral(config: DecoderConfig) -> dict[str, Any]:
    require(config.normalize_routing, config, "weights of experts that do not add up to 1")
    experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    return {**_mistral(config), **experts}


def _qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    require(config.qkv_bias == config.o_bias and not config.mlp_bias and config.qk_norm, config)
    return {
        "attention_bias": config.qkv_bias,
        "use_sliding_window": config.sliding_window is not None,
        **_one_window(config),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.intermediate_size,
        "norm_topk_prob": config.normalize_routing,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gpt_oss(config: DecoderConfig) -> dict[str, Any]:
    bounded = config.mlp_bias and config.swiglu_limit is not None
    require(bounded and config.qkv_bias == config.o_bias and not config.qk_norm, config)
    return {
        "attention_bias": config.qkv_bias,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "swiglu_alpha": config.swiglu_alpha,
        "swiglu_limit": config.swiglu_limit,
    }


class Published(NamedTuple):
    """Names a family's class in transformers and its own keys; `layered`: rotary settings differ by kind of layer."""

    architecture: str
    keys: Callable[[DecoderConfig], dict[str, Any]]
    layered: bool = False
    activation: str = "silu"


FAMILIES = {
    "llama": Published("LlamaForCausalLM", _llama),
    "mistral": Published("MistralForCausalLM", _mistral),
    "qwen2": Published("Qwen2ForCausalLM", _qwen2),
    "qwen3": Published("Qwen3ForCausalLM", _qwen3),
    "smollm3": Published("SmolLM3ForCausalLM", _smollm3),
    "granite": Published("GraniteForCausalLM", _granite),
    "gemma2": Published("Gemma2ForCausalLM", _gemma, activation="gelu_pytorch_tanh"),
    "gemma3_text": Published("Gemma3ForCausalLM", _gemma, layered=True, activation="gelu_pytorch_tanh"),
    "olmo2": Published("Olmo2ForCausalLM", _olmo2),
    "olmo3": Published("Olmo3ForCausalLM", _olmo3, layered=True),
    "phi3": Published("Phi3ForCausalLM", _phi3),
    "mixtral": Published("MixtralForCausalLM", _mixtral),
    "qwen3_moe": Published("Qwen3MoeForCausalLM", _qwen3_moe),
    "gpt_oss": Published("GptOssForCausalLM", _gpt_oss),
}
