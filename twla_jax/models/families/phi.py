"""Defines Phi-3, Phi-4 and Phi-4-mini: Llama whose queries, keys and values are stored as one tensor.

Phi-4-mini rotates a part of each head, with LongRoPE.
"""

import functools
from collections.abc import Mapping
from typing import Any

from twla_jax.models.config import DecoderConfig
from twla_jax.models.families.family import Family, HfConfig, sliding_settings
from twla_jax.models.families.llama import GGUF_TENSORS, HF_TENSORS, LlamaBlock
from twla_jax.models.rope_settings import RopeScaling, read_rope
from twla_jax.models.stored_tensors import Split, TensorSource
from twla_jax.ops.attention.reference import Positions
from twla_jax.schema import number, optional


class PhiBlock(LlamaBlock):
    """A Llama block; a method of its own keeps kernels that rotate whole heads away from it."""

    def project(self, outputs: tuple[Any, ...], positions: Positions) -> tuple[Any, Any, Any]:
        """Return what `LlamaBlock.project` does: it rotates as many features as there are angles for."""
        return super().project(outputs, positions)


def _settings(config: HfConfig, source: str) -> dict[str, Any]:
    window, layers = config.get("sliding_window"), range(config["num_hidden_layers"])
    return sliding_settings(config, window, layers, source)


def _stated(config: HfConfig) -> dict[str, Any]:
    return dict(config.get("rope_scaling") or config.get("rope_parameters") or {})


def _rotated(config: HfConfig, head_dim: int) -> int | None:
    factor = _stated(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return None if not isinstance(factor, int | float) else int(head_dim * factor)


def _rope(config: HfConfig, *, pairs: int, source: str) -> tuple[float, RopeScaling | None]:
    """Return what `read_rope` does; the rotated part of a head is read apart, and older names mean LongRoPE."""
    stated = _stated(config)
    stated.pop("partial_rotary_factor", None)
    kind = stated.pop("type", None) if "rope_type" not in stated else stated["rope_type"]
    if kind is not None:
        stated["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
    return read_rope({**config, "rope_parameters": stated, "rope_scaling": None}, pairs=pairs, source=source)


def _split(
    source: TensorSource, config: DecoderConfig, *, qkv: tuple[str, ...], gate_up: tuple[str, ...]
) -> TensorSource:
    """Return the source with its fused tensors split; each tuple names the fused one, then its parts."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden = config.intermediate_size
    spans = {qkv: ((0, q), (q, q + kv), (q + kv, q + 2 * kv)), gate_up: ((0, hidden), (hidden, 2 * hidden))}

    def parts(name: str) -> Mapping[str, tuple[int, int]] | None:
        for (fused, *into), rows in spans.items():
            if name.endswith(f".{fused}.weight"):
                return {name.replace(fused, part): span for part, span in zip(into, rows, strict=True)}
        return None

    return Split(source, parts)


_HF_QKV = ("qkv_proj", "q_proj", "k_proj", "v_proj")
_HF_GATE_UP = ("gate_up_proj", "gate_proj", "up_proj")
_GGUF_QKV = ("attn_qkv", "attn_q", "attn_k", "attn_v")
_GGUF_GATE_UP = ("ffn_up", "ffn_gate", "ffn_up")

FAMILIES = {
    "phi3": Family(
        block=PhiBlock,
        settings=_settings,
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        keys={"partial_rotary_factor": optional(number(0, 1, above=True))},
        rope=_rope,
        rotated=_rotated,
        hf_tensors=HF_TENSORS,
        hf_source=functools.partial(_split, qkv=_HF_QKV, gate_up=_HF_GATE_UP),
        hf_fused={fused: tuple(parts) for fused, *parts in (_HF_QKV, _HF_GATE_UP)},
        gguf_architecture="phi3",
        gguf_tensors=GGUF_TENSORS,
        gguf_keys=("rope.dimension_count",),
        gguf_fused={fused: tuple(parts) for fused, *parts in (_GGUF_QKV, _GGUF_GATE_UP)},
        gguf_source=functools.partial(_split, qkv=_GGUF_QKV, gate_up=_GGUF_GATE_UP),
    )
}
