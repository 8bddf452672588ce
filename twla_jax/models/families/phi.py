"""Phi-3, Phi-4 and Phi-4-mini: Llama whose queries, keys and values are stored as one tensor, gate and up as another.

Phi-4-mini rotates a part of each head, with LongRoPE.
"""

from collections.abc import Mapping
from typing import Any

from twla_jax.models.config import DecoderConfig
from twla_jax.models.families.family import Family, HfConfig, sliding_settings
from twla_jax.models.families.llama import HF_TENSORS, LlamaBlock
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


def _split(source: TensorSource, config: DecoderConfig) -> TensorSource:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden = config.intermediate_size

    def parts(name: str) -> Mapping[str, tuple[int, int]] | None:
        if name.endswith("self_attn.qkv_proj.weight"):
            rows = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
            return {name.replace("qkv_proj", part): span for part, span in rows.items()}
        if name.endswith("mlp.gate_up_proj.weight"):
            rows = {"gate_proj": (0, hidden), "up_proj": (hidden, 2 * hidden)}
            return {name.replace("gate_up_proj", part): span for part, span in rows.items()}
        return None

    return Split(source, parts)


FAMILIES = {
    "phi3": Family(
        block=PhiBlock,
        settings=_settings,
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        keys={"partial_rotary_factor": optional(number(0, 1, above=True))},
        rope=_rope,
        rotated=_rotated,
        hf_tensors=HF_TENSORS,
        hf_source=_split,
    )
}
