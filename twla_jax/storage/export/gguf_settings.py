"""Writes a decoder's settings as GGUF metadata, family by family: what `models.io.gguf` reads, the other way round."""

import logging
import math
from collections.abc import Callable

import gguf
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.io.gguf import LONG, ROPE_FACTORS, SHORT
from twla_jax.models.rope import inverse_frequencies

_log = logging.getLogger(__name__)


def add_settings(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    """Write what llama.cpp reads of a decoder's settings.

    Raises:
      TwlaError: it has no form for one of them.
    """
    sliding = config.sliding_layers if config.sliding_window is not None else ()
    if writer.arch in ("llama", "qwen2", "qwen3", "qwen3moe") and sliding:
        if len(sliding) != config.num_layers:
            raise TwlaError("llama.cpp has no form for windows in only some layers; give --format hf")
        _log.warning(
            "llama.cpp passes over the window of %s models: with more than %d tokens it computes something else",
            config.model_type,
            config.sliding_window,
        )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if sliding and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    _OWN.get(config.model_type, lambda *_: None)(writer, config)
    scaling = config.rope_scaling
    if scaling is None or scaling.kind in ("llama3", "factors"):  # those are a tensor
        return
    if scaling.kind == "longrope" and config.model_type == "phi3":  # two tensors
        writer.add_rope_scaling_orig_ctx_len(int(scaling.original_max_position_embeddings))
        writer.add_rope_scaling_attn_factors(scaling.attention_factor)
        return
    if scaling.kind not in ("linear", "yarn") or not scaling.truncate:
        raise TwlaError(f"llama.cpp has no form for rope scaling {scaling.kind!r} here; give --format hf")
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / (1 + 0.1 * math.log(scaling.factor)))
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def rope_tables(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Return what frequencies are divided by, by the name of the tensor, where the rule is not linear."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        return {
            SHORT: np.asarray(scaling.factors, np.float32),
            LONG: np.asarray(scaling.long_factors, np.float32),
        }
    if scaling is None or scaling.kind not in ("llama3", "factors"):
        return {}
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    factors = (config.rope_theta**-exponents / inverse_frequencies(config)).astype(np.float32)
    return {ROPE_FACTORS: factors}


def _granite(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_embedding_scale(config.embed_scale)
    writer.add_residual_scale(config.residual_scale)
    writer.add_logit_scale(1.0 / config.logit_scale)
    writer.add_attention_scale(config.query_scale / math.sqrt(config.head_dim))


def _gemma2(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_attn_logit_softcapping(config.attention_softcap or 0.0)
    writer.add_final_logit_softcapping(config.logit_softcap or 0.0)


def _sliding_theta(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    if config.sliding_rope_theta is not None:
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", config.sliding_rope_theta)


def _olmo3(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    if config.rope_scaling is not None:
        raise TwlaError("llama.cpp has no form for the rotary scaling of olmo3 here; give --format hf")
    _sliding_theta(writer, config)
    slides = [layer in config.sliding_layers for layer in range(config.num_layers)]
    writer.add_array(f"{writer.arch}.attention.sliding_window_pattern", slides)


def _mixtral(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)


def _qwen3_moe(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    _mixtral(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _phi3(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    if config.sliding_window is None:
        writer.add_sliding_window(0)  # by which llama.cpp tells Phi-4


_OWN: dict[str, Callable[[gguf.GGUFWriter, DecoderConfig], None]] = {
    "granite": _granite,
    "gemma2": _gemma2,
    "gemma3_text": _sliding_theta,
    "olmo3": _olmo3,
    "phi3": _phi3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}
