"""The settings of a decoder, and how they follow from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from twla_jax.errors import TwlaError
from twla_jax.models.config_keys import MOST_LAYERS, check_keys
from twla_jax.models.rope_settings import RopeScaling, read_rope
from twla_jax.schema import check_values, integer, number, optional, shown

__all__ = ["DecoderConfig", "RopeScaling", "check_length", "check_vocabulary"]

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

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
}

# What transformers assumes where a config.json is silent, for the keys whose default depends on the family.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and constants of one decoder of the Llama family.

    `sliding_layers` lists the layers whose attention sees only the last `sliding_window` positions, its own included;
    the others, and all where `sliding_window` is None, see everything before them.
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

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str = "config.json") -> "DecoderConfig":
        """Reads the settings of a Hugging Face `config.json`, of transformers 4 or 5.

        Args:
          source: the file's name, for messages.
        Raises:
          TwlaError: an architecture or a setting that this decoder does not have, or a missing key.
        """
        model_type = config.get("model_type")
        if model_type not in SUPPORTED:
            raise TwlaError(
                f"{source}: architecture {shown(model_type)} is not supported; supported are {', '.join(SUPPORTED)}"
            )
        check_keys(config, source)
        known = {**_FAMILY_DEFAULTS[model_type], **config}
        if known.get("attention_bias") and model_type == "mistral":
            raise TwlaError(f"{source}: attention_bias is not supported for mistral")

        def required(key: str) -> Any:
            if known.get(key) is None:
                raise TwlaError(f"{source}: {key!r} is missing")
            return known[key]

        num_heads, hidden = required("num_attention_heads"), required("hidden_size")
        head_dim = known.get("head_dim")
        if head_dim is None and hidden % num_heads:
            raise TwlaError(f"{source}: hidden_size {hidden} is no multiple of {num_heads} heads")
        head_dim = head_dim or hidden // num_heads
        theta, scaling = read_rope(known, pairs=head_dim // 2, source=source)
        attention_bias = known.get("attention_bias", False)
        eos = known.get("eos_token_id")
        settings = cls(
            model_type=model_type,
            vocab_size=required("vocab_size"),
            hidden_size=hidden,
            intermediate_size=required("intermediate_size"),
            num_layers=required("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=known.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            rms_norm_eps=float(known.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=known.get("max_position_embeddings", 2048),
            tie_word_embeddings=known.get("tie_word_embeddings", False),
            qkv_bias=model_type == "qwen2" or attention_bias,
            o_bias=model_type in ("llama", "qwen3") and attention_bias,
            mlp_bias=model_type == "llama" and known.get("mlp_bias", False),
            qk_norm=model_type == "qwen3",
            bos_token_id=known.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            **_sliding(known, source),
        )
        return settings.checked(source)

    def checked(self, source: str) -> "DecoderConfig":
        """Returns itself, if its sizes are in range and fit together.

        Raises:
          TwlaError: they are not; the message begins with `source`.
        """
        check_values({field: getattr(self, field) for field in _RANGES}, _RANGES, source)
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise TwlaError(
                f"{source}: {self.num_heads} heads of {self.head_dim} cannot share {self.num_kv_heads} key/value heads"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types; `from_dict` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "DecoderConfig":
        """Settings from `to_dict`, also after a round trip through JSON."""
        settings = dict(settings)
        if settings.get("rope_scaling") is not None:
            settings["rope_scaling"] = RopeScaling.from_dict(settings["rope_scaling"])
        for key in ("sliding_layers", "eos_token_ids"):
            settings[key] = tuple(settings.get(key, ()))
        return cls(**settings)


def _sliding(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns `sliding_window` and `sliding_layers`: all layers of Mistral, some of Qwen's where switched on."""
    family, count = config["model_type"], config["num_hidden_layers"]
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if family == "llama":  # transformers has no window there
        window, kinds = None, None
    if kinds is not None and len(kinds) != count:
        raise TwlaError(f"{source}: layer_types has {len(kinds)} entries for {count} layers")
    switched_on = family == "mistral" or config.get("use_sliding_window", False)
    if window is None or not switched_on:
        if kinds is not None and "sliding_attention" in kinds:
            raise TwlaError(
                f"{source}: layer_types names sliding layers, but there is no sliding_window in use"
            )
        return {"sliding_window": None, "sliding_layers": ()}
    if family == "mistral":
        if kinds is not None and "full_attention" in kinds:
            raise TwlaError(f"{source}: layer_types with full layers are not supported for mistral")
        sliding = range(count)
    elif kinds is not None:
        sliding = (i for i in range(count) if kinds[i] == "sliding_attention")
    else:
        sliding = range(min(config["max_window_layers"], count), count)
    return {"sliding_window": window, "sliding_layers": tuple(sliding)}


def check_length(seq_len: int, config: DecoderConfig) -> None:
    """Refuses windows that are longer than the model was made for.

    Raises:
      TwlaError: `seq_len` exceeds the model's positions.
    """
    if seq_len > config.max_position_embeddings:
        raise TwlaError(f"--seq-len {seq_len} exceeds the model's {config.max_position_embeddings} positions")


def check_vocabulary(tokens: Int[np.ndarray, "*shape"], vocab_size: int) -> None:
    """Refuses token ids that are no integers or outside `[0, vocab_size)`: a lookup would take another row unseen.

    Raises:
      TwlaError: the first such id, or the type.
    """
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TwlaError(f"token ids have type {tokens.dtype}, not an integer type")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise TwlaError(f"token id {int(outside[0])} is not in the model's vocabulary of {vocab_size}")
