"""Defines Granite, dense: Llama with four multipliers, of embeddings, attention scores, sublayer outputs and logits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from twla_jax.errors import TwlaError
from twla_jax.models.blocks import Site
from twla_jax.models.config import DecoderConfig
from twla_jax.models.families.family import Family, HfConfig
from twla_jax.models.families.llama import GGUF_TENSORS, HF_TENSORS, LlamaBlock
from twla_jax.ops.attention.reference import Positions
from twla_jax.schema import number

_multiplier = number(0, 1e6, above=True)


class GraniteBlock(LlamaBlock):
    """A Llama block with scaled attention scores and scaled outputs of both sublayers."""

    def __init__(self, config: DecoderConfig, *, leading: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, leading=leading, rngs=rngs, dtype=dtype)
        self.query_scale, self.residual_scale = config.query_scale, config.residual_scale

    def project(
        self, outputs: tuple[Float[Array, "b t _"], ...], positions: Positions
    ) -> tuple[Float[Array, "b t heads hd"], Float[Array, "b t kv hd"], Float[Array, "b t kv hd"]]:
        """Return what `LlamaBlock.project` does, queries times the scale of scores."""
        q, k, v = super().project(outputs, positions)
        return q * jnp.asarray(self.query_scale, q.dtype), k, v

    def to_stream(self, site: Site, output: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the output times the residual's multiplier."""
        return output * jnp.asarray(self.residual_scale, output.dtype)


def _settings(config: HfConfig, source: str) -> dict[str, Any]:
    bias = config.get("attention_bias", False)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": config.get("mlp_bias", False),
        "embed_scale": float(config["embedding_multiplier"]),
        "logit_scale": 1.0 / config["logits_scaling"],
        "residual_scale": float(config["residual_multiplier"]),
        "query_scale": config["attention_multiplier"] * head_dim**0.5,  # it stands in for head_dim^(−1/2)
    }


def _gguf_settings(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    if not get("rope.scaling.finetuned", True):  # this family's way to say so
        raise TwlaError("granite without rotary positions is not supported")
    usual = settings["head_dim"] ** -0.5
    return {
        "embed_scale": get("embedding_scale", 1.0),
        "logit_scale": 1.0 / get("logit_scale", 1.0),
        "residual_scale": get("residual_scale", 1.0),
        "query_scale": get("attention.scale", usual) / usual,
    }


_MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")

FAMILIES = {
    "granite": Family(
        block=GraniteBlock,
        settings=_settings,
        defaults={**dict.fromkeys(_MULTIPLIERS, 1.0), "bos_token_id": 1, "eos_token_id": 2},
        keys=dict.fromkeys(_MULTIPLIERS, _multiplier),
        hf_tensors=HF_TENSORS,
        gguf_architecture="granite",
        gguf_tensors=GGUF_TENSORS,
        gguf_settings=_gguf_settings,
        gguf_keys=("embedding_scale", "logit_scale", "residual_scale", "attention.scale"),
        gguf_interleaved=True,
    )
}
