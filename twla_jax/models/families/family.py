"""Defines what a model family consists of: its block, how its settings are read and how its tensors are called."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.config import DecoderConfig
from twla_jax.models.config_keys import check_keys
from twla_jax.models.rope_settings import read_rope
from twla_jax.models.stored_tensors import TensorSource
from twla_jax.schema import Check

HfConfig = Mapping[str, Any]
RopeReader = Callable[..., tuple]


def _all(config: HfConfig, head_dim: int) -> int | None:
    return None


def _as_stored(source: TensorSource, config: DecoderConfig) -> TensorSource:
    return source


def _nothing_more(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family, as data.

    Attributes:
      block: the class of its blocks.
      settings: the fields of `DecoderConfig` that only this family's `config.json` decides, from its contents with
        the defaults filled in and the file's name.
      defaults: what transformers assumes where a `config.json` is silent.
      hf_tensors: from a decoder's parameter path to the tensor's name in safetensors files; `{}` is the layer.
      keys: checks of keys that only this family's `config.json` has, or that have other values there.
      rope: reads `rope_theta`, the scaling and, where they have their own, the sliding layers' theta.
      rotated: how many features of a head are rotated, from the file's contents and a head's size.
      hf_source: gives the tensors of safetensors files the decoder's form, where they are stored in another.
      hf_fused: by the name of a tensor in safetensors files, the names of those that it holds, one above the other.
      hf_alternating: by the name of a tensor of all experts in safetensors files, the names of the two whose columns
        it holds in turn; these families' files hold such tensors inputs first.
      hf_mxfp4: whether its experts may be in MXFP4 there.
      hf_norms_less_one: whether norms are stored there as what they differ from 1 by.
      gguf_settings: the fields of `DecoderConfig` that this family's GGUF files decide in another way, from a function
        that looks up metadata and the fields read so far.
      gguf_keys: metadata that `gguf_settings` reads, of what would else be refused.
      gguf_fused: as `hf_fused`, of GGUF files.
      gguf_source: gives the tensors of GGUF files the decoder's form, where they are stored in another.
      gguf_architecture: the name in GGUF files; None where they call it by another family's.
      gguf_tensors: from a decoder's parameter path to the tensor's name in GGUF files.
      gguf_interleaved: whether these order query and key rows for rotations of neighbouring pairs.
    """

    block: type[ChainBlock]
    settings: Callable[[HfConfig, str], dict[str, Any]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, Check] = dataclasses.field(default_factory=dict)
    rope: RopeReader = read_rope
    rotated: Callable[[HfConfig, int], int | None] = _all
    hf_tensors: Mapping[str, str]
    hf_source: Callable[[TensorSource, DecoderConfig], TensorSource] = _as_stored
    hf_fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    hf_alternating: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    hf_mxfp4: bool = False
    hf_norms_less_one: bool = False
    gguf_settings: Callable[[Callable[..., Any], Mapping[str, Any]], dict[str, Any]] = _nothing_more
    gguf_keys: Collection[str] = ()
    gguf_fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    gguf_source: Callable[[TensorSource, DecoderConfig], TensorSource] = _as_stored
    gguf_architecture: str | None = None
    gguf_tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf_interleaved: bool = False

    def read_config(self, config: HfConfig, source: str) -> DecoderConfig:
        """Return the settings in the contents of a `config.json` of this family.

        Args:
          config: as transformers 4 or 5 wrote it.
          source: the file's name, for messages.

        Raises:
          TwlaError: a setting that is out of range or that the block has no part for, or a missing key.
        """
        check_keys(config, source, self.keys, mxfp4=self.hf_mxfp4)
        known = {**self.defaults, **config}

        def required(key: str) -> Any:
            if known.get(key) is None:
                raise TwlaError(f"{source}: {key!r} is missing")
            return known[key]

        num_heads, hidden = required("num_attention_heads"), required("hidden_size")
        head_dim = known.get("head_dim")
        if head_dim is None and hidden % num_heads:
            raise TwlaError(f"{source}: hidden_size {hidden} is no multiple of {num_heads} heads")
        head_dim = head_dim or hidden // num_heads
        rotary_dim = self.rotated(known, head_dim)
        theta, scaling, *sliding_theta = self.rope(known, pairs=(rotary_dim or head_dim) // 2, source=source)
        eos = known.get("eos_token_id")
        common = {
            "model_type": required("model_type"),
            "vocab_size": required("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": required("intermediate_size"),
            "num_layers": required("num_hidden_layers"),
            "num_heads": num_heads,
            "num_kv_heads": known.get("num_key_value_heads") or num_heads,
            "head_dim": head_dim,
            "rms_norm_eps": float(known.get("rms_norm_eps", 1e-6)),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "sliding_rope_theta": sliding_theta[0] if sliding_theta else None,
            "rotary_dim": rotary_dim,
            "max_position_embeddings": known.get("max_position_embeddings", 2048),
            "tie_word_embeddings": known.get("tie_word_embeddings", False),
            "bos_token_id": known.get("bos_token_id"),
            "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        }
        return DecoderConfig(**{**common, **self.settings(known, source)}).checked(source)


def layer_kinds(config: HfConfig, source: str) -> list[str] | None:
    """Return `layer_types`, if they are stated, one a layer.

    Args:
      config: contents of a `config.json`.
      source: the file's name, for messages.

    Raises:
      TwlaError: there are more or fewer than layers.
    """
    kinds, count = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is not None and len(kinds) != count:
        raise TwlaError(f"{source}: layer_types has {len(kinds)} entries for {count} layers")
    return kinds


def sliding_settings(
    config: HfConfig, window: int | None, layers: Iterable[int], source: str
) -> dict[str, Any]:
    """Return `sliding_window` and `sliding_layers` for a window in these layers.

    Args:
      config: contents of a `config.json`.
      window: None where there is none in use.
      layers: those that have it.
      source: the file's name, for messages.

    Raises:
      TwlaError: `layer_types` names sliding layers where no window is in use.
    """
    if window is None:
        if "sliding_attention" in (layer_kinds(config, source) or []):
            raise TwlaError(
                f"{source}: layer_types names sliding layers, but there is no sliding_window in use"
            )
        return {"sliding_window": None, "sliding_layers": ()}
    return {"sliding_window": window, "sliding_layers": tuple(layers)}
