"""Defines Gemma 2 and 3, text: norms before and after each sublayer, scaled embeddings, a tanh-GELU gate, windows.

Norms are stored as what they differ from 1 by. Gemma 2 caps scores and logits; Gemma 3 norms queries and keys, and its
sliding layers have a rotary base of their own.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from twla_jax.errors import TwlaError
from twla_jax.models.blocks import Site
from twla_jax.models.config import DecoderConfig
from twla_jax.models.families.family import Family, HfConfig, layer_kinds, sliding_settings
from twla_jax.models.families.llama import GGUF_TENSORS, HF_TENSORS, LlamaBlock
from twla_jax.models.layers import RMSNorm
from twla_jax.models.rope_settings import read_layered_rope
from twla_jax.models.stored_tensors import PlusOne, TensorSource
from twla_jax.ops.attention.reference import Positions
from twla_jax.schema import integer, number, one_of, optional, text

_cap = optional(number(0, 1e6, above=True))


class GemmaBlock(LlamaBlock):
    """`x ← x + norm(o(attend(qkv(norm(x)))))`, then the same around `down(gelu(gate(·)) · up(·))`."""

    norms = (*LlamaBlock.norms, "o_norm", "down_norm")

    def __init__(self, config: DecoderConfig, *, leading: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, leading=leading, rngs=rngs, dtype=dtype)
        norm = functools.partial(RMSNorm, epsilon=config.rms_norm_eps, leading=leading, dtype=dtype)
        self.o_norm, self.down_norm = norm(config.hidden_size), norm(config.hidden_size)
        self.query_scale, self.softcap = config.query_scale, config.attention_softcap

    def project(
        self, outputs: tuple[Float[Array, "b t _"], ...], positions: Positions
    ) -> tuple[Float[Array, "b t heads hd"], Float[Array, "b t kv hd"], Float[Array, "b t kv hd"]]:
        """Return what `LlamaBlock.project` does, queries times the scale of scores."""
        q, k, v = super().project(outputs, positions)
        return q if self.query_scale == 1.0 else q * jnp.asarray(self.query_scale, q.dtype), k, v

    def score_changes(self) -> dict[str, Any]:
        """Return the cap of the scores, where there is one."""
        return {} if self.softcap is None else {"softcap": self.softcap}

    def activate(self, gate: Float[Array, "b t hidden"]) -> Float[Array, "b t hidden"]:
        """Return the gate's activation, the GELU by tanh."""
        return jax.nn.gelu(gate, approximate=True)

    def to_stream(self, site: Site, output: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the sublayer's output through the norm after it."""
        return (self.o_norm if site.name == "o" else self.down_norm)(output)


def _common(config: HfConfig, source: str) -> dict[str, Any]:
    bias, kinds = config.get("attention_bias", False), layer_kinds(config, source)
    if kinds is None:
        period = config.get("sliding_window_pattern") or _PERIODS[config["model_type"]]
        layers = [index for index in range(config["num_hidden_layers"]) if (index + 1) % period]
    else:
        layers = [index for index, kind in enumerate(kinds) if kind == "sliding_attention"]
    if layers and config.get("sliding_window") is None:
        raise TwlaError(f"{source}: layers are to slide, but there is no sliding_window")
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "embed_scale": config["hidden_size"] ** 0.5,
        "query_scale": (config["head_dim"] / config["query_pre_attn_scalar"]) ** 0.5,
        "logit_softcap": config.get("final_logit_softcapping"),
        **sliding_settings(config, config.get("sliding_window"), layers, source),
    }


def _settings2(config: HfConfig, source: str) -> dict[str, Any]:
    return {**_common(config, source), "attention_softcap": config.get("attn_logit_softcapping")}


def _settings3(config: HfConfig, source: str) -> dict[str, Any]:
    return {**_common(config, source), "qk_norm": True}


def _plus_one(source: TensorSource, config: DecoderConfig) -> TensorSource:
    return PlusOne(source)


def _gguf_settings2(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp takes for granted of this architecture; its norms are stored as they are."""
    layers, hidden, head_dim = settings["num_layers"], settings["hidden_size"], settings["head_dim"]
    of_27b = layers == 46  # the one size whose scores are scaled by another number than the head's
    caps = (get("attn_logit_softcapping", 50.0), get("final_logit_softcapping", 30.0))
    return {
        "embed_scale": hidden**0.5,
        "query_scale": (head_dim * settings["num_heads"] / hidden) ** 0.5 if of_27b else 1.0,
        "attention_softcap": caps[0] or None,
        "logit_softcap": caps[1] or None,
        "sliding_window": settings["sliding_window"] or 4096,
        "sliding_layers": tuple(range(0, layers, 2)),
    }


def _gguf_settings3(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp takes for granted of this architecture; its norms are stored as they are."""
    layers, hidden, head_dim = settings["num_layers"], settings["hidden_size"], settings["head_dim"]
    of_27b = layers == 62  # the one size whose scores are scaled by another number than the head's
    return {
        "embed_scale": hidden**0.5,
        "query_scale": (head_dim * settings["num_heads"] / hidden) ** 0.5 if of_27b else 1.0,
        "sliding_layers": tuple(index for index in range(layers) if (index + 1) % 6),
        # Without a window there are no sliding layers, and all have the one base.
        "sliding_rope_theta": get("rope.freq_base_swa", 10000.0) if settings["sliding_window"] else None,
    }


_HF_TENSORS = {
    **HF_TENSORS,
    "blocks.o_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.post_norm.scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "blocks.down_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
_GGUF_TENSORS = {
    **GGUF_TENSORS,
    "blocks.o_norm.scale": "blk.{}.post_attention_norm.weight",
    "blocks.down_norm.scale": "blk.{}.post_ffw_norm.weight",
}
_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_PERIODS = {"gemma2": 2, "gemma3_text": 6}  # one layer in so many reaches over the whole text
_KEYS = {
    "hidden_activation": optional(one_of("gelu_pytorch_tanh")),
    "head_dim": integer(2, 2**16),
    "hidden_act": optional(text()),  # transformers reads hidden_activation alone
    "query_pre_attn_scalar": number(0, 1e6, above=True),
    "final_logit_softcapping": _cap,
    "use_bidirectional_attention": optional(one_of(False)),
    "sliding_window_pattern": integer(1, 4096),
    "rope_local_base_freq": number(0, 1e30, above=True),
}

FAMILIES = {
    "gemma2": Family(
        block=GemmaBlock,
        settings=_settings2,
        defaults={
            **_DEFAULTS,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        # transformers alternates the two kinds whatever the file says.
        keys={**_KEYS, "attn_logit_softcapping": _cap, "sliding_window_pattern": one_of(2)},
        hf_tensors=_HF_TENSORS,
        hf_source=_plus_one,
        hf_norms_less_one=True,
        gguf_architecture="gemma2",
        gguf_tensors=_GGUF_TENSORS,
        gguf_settings=_gguf_settings2,
        gguf_keys=("attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "gemma3_text": Family(
        block=GemmaBlock,
        settings=_settings3,
        defaults={**_DEFAULTS, "max_position_embeddings": 131072},
        # transformers has no cap of scores there, whatever the file says.
        keys={**_KEYS, "attn_logit_softcapping": one_of(None)},
        rope=functools.partial(
            read_layered_rope, theta=1e6, sliding_theta=1e4, older_key="rope_local_base_freq"
        ),
        hf_tensors=_HF_TENSORS,
        hf_source=_plus_one,
        hf_norms_less_one=True,
        gguf_architecture="gemma3",
        gguf_tensors=_GGUF_TENSORS,
        gguf_settings=_gguf_settings3,
    ),
}
