"""Defines OLMo 2 and 3: norms after each sublayer, not before, and norms over all queries and keys of a token.

OLMo 3 adds sliding windows in three of four layers, whose rotary positions are not scaled.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

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
from twla_jax.ops.attention import rope
from twla_jax.ops.attention.reference import Positions


class OlmoBlock(LlamaBlock):
    """`x ← x + norm(o(attend(qkv(x))))`, then `x ← x + norm(down(silu(gate(x)) · up(x)))`."""

    sites = (
        Site("qkv", ("q", "k", "v")),
        Site("o", ("o",), writes=True),
        Site("mlp", ("gate", "up")),
        Site("down", ("down",), writes=True, recomputed=True),
    )
    norms = ("o_norm", "down_norm")

    def __init__(self, config: DecoderConfig, *, leading: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, leading=leading, rngs=rngs, dtype=dtype)
        norm = functools.partial(RMSNorm, epsilon=config.rms_norm_eps, leading=leading, dtype=dtype)
        self.input_norm, self.post_norm = nnx.data(None), nnx.data(None)
        self.o_norm, self.down_norm = norm(config.hidden_size), norm(config.hidden_size)
        self.q_norm = nnx.data(norm(config.num_heads * config.head_dim))
        self.k_norm = nnx.data(norm(config.num_kv_heads * config.head_dim))

    def project(
        self, outputs: tuple[Float[Array, "b t _"], ...], positions: Positions
    ) -> tuple[Float[Array, "b t heads hd"], Float[Array, "b t kv hd"], Float[Array, "b t kv hd"]]:
        """Return queries, keys and values; queries and keys normed over all heads, and rotated to their positions."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        q, k, v = outputs
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (self.q_norm(q), self.k_norm(k), v))
        return rope.rotate(q, positions.cos, positions.sin), rope.rotate(k, positions.cos, positions.sin), v

    def to_stream(self, site: Site, output: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the sublayer's output through the norm after it."""
        return (self.o_norm if site.name == "o" else self.down_norm)(output)


def _settings2(config: HfConfig, source: str) -> dict[str, Any]:
    bias = config.get("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias}


def _settings3(config: HfConfig, source: str) -> dict[str, Any]:
    kinds, count = layer_kinds(config, source), config["num_hidden_layers"]
    if kinds is None:
        layers = [index for index in range(count) if (index + 1) % 4]
    else:
        layers = [index for index, kind in enumerate(kinds) if kind == "sliding_attention"]
    return {
        **_settings2(config, source),
        **sliding_settings(config, config.get("sliding_window"), layers, source),
    }


def _gguf_settings(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells OLMo 2 from OLMo 3, whose files have the same architecture: sliding windows.

    Raises:
      TwlaError: OLMo 3 with YaRN; its files state an attention factor that readers take in different ways.
    """
    if settings["sliding_window"] is None:
        return {"qk_norm": False}
    if settings["rope_scaling"] is not None:
        raise TwlaError("OLMo 3 with a rotary scaling is not read from GGUF; give the Hugging Face folder")
    layers, pattern = range(settings["num_layers"]), get("attention.sliding_window_pattern", 4)
    if isinstance(pattern, list):
        slide = [index for index in layers if index < len(pattern) and pattern[index]]
    else:
        slide = [index for index in layers if (index + 1) % pattern]
    theta = get("rope.freq_base_swa", settings["rope_theta"])
    return {
        "model_type": "olmo3",
        "qk_norm": False,
        "sliding_layers": tuple(slide),
        "sliding_rope_theta": theta,
    }


def _without_norms_before(tensors: Mapping[str, str]) -> dict[str, str]:
    absent = ("blocks.input_norm.scale", "blocks.post_norm.scale")
    return {name: tensor for name, tensor in tensors.items() if name not in absent}


_HF_TENSORS = {
    **_without_norms_before(HF_TENSORS),
    "blocks.o_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.down_norm.scale": "model.layers.{}.post_feedforward_layernorm.weight",
}

_GGUF_TENSORS = {
    **_without_norms_before(GGUF_TENSORS),
    "blocks.o_norm.scale": "blk.{}.post_attention_norm.weight",
    "blocks.down_norm.scale": "blk.{}.post_ffw_norm.weight",
}

FAMILIES = {
    "olmo2": Family(
        block=OlmoBlock,
        settings=_settings2,
        defaults={"rms_norm_eps": 1e-5, "eos_token_id": 50279},
        hf_tensors=_HF_TENSORS,
        gguf_architecture="olmo2",
        gguf_tensors=_GGUF_TENSORS,
        gguf_settings=_gguf_settings,
    ),
    "olmo3": Family(
        block=OlmoBlock,
        settings=_settings3,
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "eos_token_id": 50279},
        rope=functools.partial(read_layered_rope, theta=5e5, sliding_theta=5e5),
        hf_tensors=_HF_TENSORS,
        gguf_tensors=_GGUF_TENSORS,
    ),
}
