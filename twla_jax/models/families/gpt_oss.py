"""Defines gpt-oss: experts with biases and a clamped SwiGLU, attention with sinks, windows in every other layer."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from twla_jax.models.config import DecoderConfig
from twla_jax.models.config_keys import KINDS_OF_LAYER
from twla_jax.models.families.family import Family, HfConfig, layer_kinds, sliding_settings
from twla_jax.models.families.moe import EXPERT_KEYS, MoeBlock, expert_settings, expert_tensors
from twla_jax.models.layers import Linear
from twla_jax.models.rope_settings import RopeScaling, read_rope
from twla_jax.models.stored_tensors import TensorSource
from twla_jax.schema import number


class GptOssBlock(MoeBlock):
    """A `MoeBlock` with biases throughout, another gate, and for each head a sink that takes part of the softmax.

    The router's probabilities are those of the chosen experts alone: they add up to 1.
    """

    def __init__(self, config: DecoderConfig, *, leading: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(config, leading=leading, rngs=rngs, dtype=dtype)
        experts = config.num_experts
        self.router = Linear(config.hidden_size, experts, bias=True, leading=leading, rngs=rngs, dtype=dtype)
        self.sinks = nnx.Param(jnp.zeros((*leading, config.num_heads), dtype))
        self.swiglu_alpha, self.swiglu_limit = config.swiglu_alpha, config.swiglu_limit

    def score_changes(self) -> dict[str, Any]:
        """Return the sinks, which take their part of the softmax."""
        return {"sinks": self.sinks.get_value()}

    def gated(
        self, gate: Float[Array, "b t k hidden"], up: Float[Array, "b t k hidden"]
    ) -> Float[Array, "b t k hidden"]:
        """Return `g · σ(α·g) · (u + 1)`, the gate g cut off above the limit and u on both sides."""
        if self.swiglu_limit is not None:
            gate, up = (
                jnp.minimum(gate, self.swiglu_limit),
                jnp.clip(up, -self.swiglu_limit, self.swiglu_limit),
            )
        return gate * jax.nn.sigmoid(gate * self.swiglu_alpha) * (up + 1)


class ExpertsApart:
    """A source whose experts' tensors, `[experts, in, out]` with gates and ups in turn, come as the decoder has them.

    `gate_up_proj` becomes `gate_proj` and `up_proj`, and these and `down_proj` get their rows first. So do biases.
    """

    def __init__(self, source: TensorSource):
        self._source = source
        self._parts: dict[str, tuple[str, slice]] = {}
        for stored in source.names():
            front, dot, last = stored.rpartition(".experts.")
            if not dot or last.removesuffix("_bias") != "gate_up_proj":
                self._parts[stored] = stored, slice(None)
            else:
                for start, name in enumerate(("gate_proj", "up_proj")):
                    part = f"{front}{dot}{last.replace('gate_up_proj', name)}"
                    self._parts[part] = stored, slice(start, None, 2)

    def names(self) -> Collection[str]:
        """Return the names with gates and ups apart."""
        return self._parts.keys()

    def where(self, name: str) -> str:
        """Return the file of the tensor, or of the one that it is a part of."""
        return self._source.where(self._stored(name))

    def dtype(self, name: str) -> np.dtype:
        """Return the stored type."""
        return self._source.dtype(self._stored(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that `read` gives."""
        shape, part = self._source.shape(self._stored(name)), self._parts[name][1]
        if not shape or part == slice(None):
            return _rows_first(name, shape)
        return _rows_first(name, (*shape[:-1], len(range(shape[-1])[part])))

    def read(self, name: str) -> np.ndarray:
        """Return the tensor; of gates or ups a copy, so that the other half is let go."""
        stored, part = self._parts[name]
        tensor = self._source.read(stored)
        if part != slice(None):
            tensor = tensor[..., part].copy(order="K")
        return tensor.swapaxes(-1, -2) if _is_matrices(name, tensor.ndim) else tensor

    def _stored(self, name: str) -> str:
        return self._parts[name][0] if name in self._parts else name


def _is_matrices(name: str, axes: int) -> bool:
    return ".experts." in name and name.endswith("_proj") and axes == 3


def _rows_first(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[1]) if _is_matrices(name, len(shape)) else shape


def _settings(config: HfConfig, source: str) -> dict[str, Any]:
    bias, count = config["attention_bias"], config["num_hidden_layers"]
    full, sliding = KINDS_OF_LAYER
    kinds = layer_kinds(config, source) or [sliding, full] * (count // 2) + [sliding] * (count % 2)
    layers = [index for index, kind in enumerate(kinds) if kind == sliding]
    stated = {**config, "layer_types": kinds}
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": True,
        "swiglu_alpha": float(config["swiglu_alpha"]),
        "swiglu_limit": float(config["swiglu_limit"]),
        "normalize_routing": True,
        **expert_settings(config, source, default=128),
        **sliding_settings(stated, config.get("sliding_window"), layers, source),
    }


def _rope(config: HfConfig, *, pairs: int, source: str) -> tuple[float, RopeScaling | None]:
    """Return what `read_rope` does; where the file has no rotary settings, transformers takes YaRN's by 32."""
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config = {**config, "rope_parameters": _YARN}
    return read_rope(config, pairs=pairs, source=source, theta=150000.0)


_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_EXPERTS = {name: f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}
_HF_TENSORS = {
    **expert_tensors("mlp.router.weight", _EXPERTS),
    **{f"blocks.{name}.bias": f"model.layers.{{}}.{stored}_bias" for name, stored in _EXPERTS.items()},
    "blocks.router.bias": "model.layers.{}.mlp.router.bias",
    "blocks.sinks": "model.layers.{}.self_attn.sinks",
}

FAMILIES = {
    "gpt_oss": Family(
        block=GptOssBlock,
        settings=_settings,
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "attention_bias": True,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        rope=_rope,
        keys={
            **EXPERT_KEYS,
            "swiglu_alpha": number(0, 1e6),
            "swiglu_limit": number(0, 1e9, above=True),
        },
        hf_tensors=_HF_TENSORS,
        hf_source=lambda source, config: ExpertsApart(source),
        hf_mxfp4=True,
        hf_alternating={"gate_up_proj": ("gate_proj", "up_proj")},
    )
}
