"""The settings of a decoder, and how they follow from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from twla_jax.errors import TwlaError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

# What transformers assumes where a config.json is silent, for the keys whose default depends on the family.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for longer contexts.

    `linear` divides all of them by `factor`; `llama3` divides the low ones, keeps the high ones and blends between;
    `factors` divides the i-th by `factors[i]`, the form in which GGUF files state the llama3 rule.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


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
                f"{source}: architecture {model_type!r} is not supported; supported are {', '.join(SUPPORTED)}"
            )
        known = {**_FAMILY_DEFAULTS[model_type], **config}
        _refuse_unsupported(known, source)

        def required(key):
            if known.get(key) is None:
                raise TwlaError(f"{source}: {key!r} is missing")
            return known[key]

        num_heads = required("num_attention_heads")
        attention_bias = bool(known.get("attention_bias", False))
        eos = known.get("eos_token_id")
        settings = cls(
            model_type=model_type,
            vocab_size=required("vocab_size"),
            hidden_size=required("hidden_size"),
            intermediate_size=required("intermediate_size"),
            num_layers=required("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=known.get("num_key_value_heads") or num_heads,
            head_dim=known.get("head_dim") or required("hidden_size") // num_heads,
            rms_norm_eps=float(known.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=known.get("max_position_embeddings", 2048),
            tie_word_embeddings=bool(known.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2" or attention_bias,
            o_bias=model_type in ("llama", "qwen3") and attention_bias,
            mlp_bias=model_type == "llama" and bool(known.get("mlp_bias", False)),
            qk_norm=model_type == "qwen3",
            bos_token_id=known.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            **_rope(known, source),
            **_sliding(known),
        )
        return settings.checked(source)

    def checked(self, source: str) -> "DecoderConfig":
        """Itself, if its sizes fit together; TwlaError naming `source` if not."""
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
            scaling = dict(settings["rope_scaling"])
            settings["rope_scaling"] = RopeScaling(
                **{**scaling, "factors": tuple(scaling.get("factors", ()))}
            )
        for key in ("sliding_layers", "eos_token_ids"):
            settings[key] = tuple(settings.get(key, ()))
        return cls(**settings)


def _refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    """Refuses settings that would change the forward pass in a way the decoder has no part for."""
    wanted = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "quantization_config": None}
    for key, value in wanted.items():
        if (found := config.get(key)) not in (None, value):
            shown = found.get("quant_method", found) if isinstance(found, Mapping) else found
            raise TwlaError(f"{source}: {key} {shown!r} is not supported, only {value!r}")
    if config.get("attention_bias") and config["model_type"] == "mistral":
        raise TwlaError(f"{source}: attention_bias is not supported for mistral")


def _rope(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`; transformers 5 writes both into `rope_parameters`, 4 side by side."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise TwlaError(
            f"{source}: partial_rotary_factor {parameters['partial_rotary_factor']} is not supported, only 1.0"
        )
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    keys = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in keys:
        raise TwlaError(
            f"{source}: rope scaling {kind!r} is not supported; supported are default, {', '.join(keys)}"
        )
    for key in keys[kind]:
        if key not in parameters:
            raise TwlaError(f"{source}: rope scaling {kind!r} lacks {key!r}")
    return {
        "rope_theta": theta,
        "rope_scaling": RopeScaling(kind=kind, **{key: parameters[key] for key in keys[kind]}),
    }


def _sliding(config: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` and `sliding_layers`: all layers of Mistral, some of Qwen's where switched on."""
    window, layers = config.get("sliding_window"), range(config["num_hidden_layers"])
    if config["model_type"] == "llama" or (
        config["model_type"] != "mistral" and not config.get("use_sliding_window", False)
    ):
        window = None
    if window is None:
        return {"sliding_window": None, "sliding_layers": ()}
    if config["model_type"] == "mistral":
        sliding = tuple(layers)
    elif config.get("layer_types"):
        sliding = tuple(i for i in layers if config["layer_types"][i] == "sliding_attention")
    else:
        sliding = tuple(i for i in layers if i >= config["max_window_layers"])
    return {"sliding_window": window, "sliding_layers": sliding}


def check_length(seq_len: int, config: DecoderConfig) -> None:
    """Refuses windows that are longer than the model was made for.

    Raises:
      TwlaError: `seq_len` exceeds the model's positions.
    """
    if seq_len > config.max_position_embeddings:
        raise TwlaError(f"--seq-len {seq_len} exceeds the model's {config.max_position_embeddings} positions")


def check_vocabulary(tokens: Int[np.ndarray, "*shape"], vocab_size: int) -> None:
    """TwlaError naming the first token id outside `[0, vocab_size)`: a lookup would take another row without a word."""
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise TwlaError(f"token id {int(outside[0])} is not in the model's vocabulary of {vocab_size}")
