"""Defines the settings of a decoder; `models.families` reads them from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from twla_jax.errors import TwlaError
from twla_jax.models.config_keys import MOST_LAYERS
from twla_jax.models.rope_settings import RopeScaling
from twla_jax.schema import check_values, integer, number, optional

__all__ = ["DecoderConfig", "RopeScaling", "check_length", "check_vocabulary"]

# Ranges of the settings themselves, whatever file they came from.
_RANGES = {
    "vocab_size": integer(1, 2**26),
    "hidden_size": integer(1, 2**24),
    "intermediate_size": integer(1, 2**24),
    "num_layers": integer(1, MOST_LAYERS),
    "num_heads": integer(1, 2**16),
    "num_kv_heads": integer(1, 2**16),
    "head_dim": integer(2, 2**16),
    "rms_norm_eps": number(0, 1, above=True),
    "rope_theta": number(0, 1e30, above=True),
    "max_position_embeddings": integer(1, 2**31 - 1),
    "sliding_window": optional(integer(1, 2**31 - 1)),
    "sliding_rope_theta": optional(number(0, 1e30, above=True)),
    "num_experts": integer(0, 2**16),
    "experts_per_token": integer(0, 2**16),
    "rotary_dim": optional(integer(2, 2**16)),
    "swiglu_alpha": number(0, 1e6),
    "swiglu_limit": optional(number(0, 1e9, above=True)),
    **dict.fromkeys(
        ("query_scale", "embed_scale", "residual_scale", "logit_scale"), number(0, 1e9, above=True)
    ),
    **dict.fromkeys(("attention_softcap", "logit_softcap"), optional(number(0, 1e9, above=True))),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and constants of one decoder; `model_type` names its family.

    Attributes:
      sliding_layers: those whose attention sees only the last `sliding_window` positions, its own included; the
        others, and all where `sliding_window` is None, see everything before them.
      sliding_rope_theta: where the sliding layers have rotary positions of their own, without a scaling.
      no_rope_layers: those without rotary positions.
      rotary_dim: features of a head that are rotated, the first ones; all if None.
      query_scale: what queries are multiplied by beside the usual `head_dim^(−1/2)`.
      attention_softcap: c of `c · tanh(scores / c)`, None for none; `logit_softcap` likewise of the logits.
      num_experts: of a mixture's layers, each with an MLP of `intermediate_size`; 0 where there are none.
      experts_per_token: those that a token goes to.
      normalize_routing: whether the weights of a token's experts add up to 1.
      swiglu_alpha, swiglu_limit: a and c of the gate `min(g, c) · σ(a · min(g, c)) · (clip(u, −c, c) + 1)`, which one
        family has.
      embed_scale, residual_scale, logit_scale: what embeddings, a sublayer's output and logits are multiplied by.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    sliding_rope_theta: float | None = None
    no_rope_layers: tuple[int, ...] = ()
    rotary_dim: int | None = None
    query_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    normalize_routing: bool = False
    swiglu_alpha: float = 1.0
    swiglu_limit: float | None = None

    def checked(self, source: str) -> "DecoderConfig":
        """Return these settings, if their sizes are in range and fit together.

        Args:
          source: where they are from, for messages.

        Raises:
          TwlaError: they are not; the message begins with `source`.
        """
        check_values({field: getattr(self, field) for field in _RANGES}, _RANGES, source)
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise TwlaError(
                f"{source}: {self.rotary_dim} of {self.head_dim} features of a head cannot be rotated"
            )
        if self.experts_per_token > self.num_experts:
            raise TwlaError(f"{source}: {self.experts_per_token} experts a token of {self.num_experts}")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise TwlaError(
                f"{source}: {self.num_heads} heads of {self.head_dim} cannot share {self.num_kv_heads} key/value heads"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types; `from_dict` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "DecoderConfig":
        """Return settings from `to_dict`, also after a round trip through JSON."""
        settings = dict(settings)
        if settings.get("rope_scaling") is not None:
            settings["rope_scaling"] = RopeScaling.from_dict(settings["rope_scaling"])
        for key in ("sliding_layers", "eos_token_ids", "no_rope_layers"):
            settings[key] = tuple(settings.get(key, ()))
        return cls(**settings)


def check_length(seq_len: int, config: DecoderConfig) -> None:
    """Refuse windows that are longer than the model was made for.

    Args:
      seq_len: tokens in a window.
      config: the model's settings.

    Raises:
      TwlaError: `seq_len` exceeds the model's positions.
    """
    if seq_len > config.max_position_embeddings:
        raise TwlaError(f"--seq-len {seq_len} exceeds the model's {config.max_position_embeddings} positions")


def check_vocabulary(tokens: Int[np.ndarray, "*shape"], vocab_size: int) -> None:
    """Refuse token ids that are no integers or outside `[0, vocab_size)`: a lookup would take another row unseen.

    Args:
      tokens: token ids.
      vocab_size: the ids that exist are below it.

    Raises:
      TwlaError: naming the first such id, or the type.
    """
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TwlaError(f"token ids have type {tokens.dtype}, not an integer type")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise TwlaError(f"token id {int(outside[0])} is not in the model's vocabulary of {vocab_size}")
