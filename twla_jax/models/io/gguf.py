"""Reads a GGUF file: settings from its metadata, tensors dequantised through the gguf package."""

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.config_keys import MOST_LAYERS
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import FAMILIES, by_gguf_architecture, family_of
from twla_jax.models.io.gguf_file import GgufFile
from twla_jax.models.io.loading import fill_decoder
from twla_jax.models.rope_settings import RopeScaling
from twla_jax.schema import boolean, check_values, either, integer, number, sequence, shown, text

ROPE_FACTORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"  # of LongRoPE
_FLOATS: dict[Any, np.dtype] = {
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


_size = integer(1, 2**24)
_positive = number(0, 1e30, above=True)
_CHECKS = {
    "embedding_length": _size,
    "feed_forward_length": _size,
    "block_count": integer(1, MOST_LAYERS),
    "attention.head_count": integer(1, 2**16),
    "attention.head_count_kv": integer(1, 2**16),
    "attention.key_length": integer(2, 2**16),
    "attention.value_length": integer(2, 2**16),
    "attention.layer_norm_rms_epsilon": number(0, 1, above=True),
    "attention.sliding_window": integer(0, 2**31 - 1),
    "attention.sliding_window_pattern": either(
        integer(1, MOST_LAYERS), sequence(boolean(), longest=MOST_LAYERS)
    ),
    "attention.scale": _positive,
    "attn_logit_softcapping": number(0, 1e6),
    "final_logit_softcapping": number(0, 1e6),
    "embedding_scale": _positive,
    "residual_scale": _positive,
    "logit_scale": _positive,
    "context_length": integer(1, 2**31 - 1),
    "expert_count": integer(0, 2**16),
    "expert_used_count": integer(0, 2**16),
    "expert_feed_forward_length": _size,
    "rope.dimension_count": integer(1, 2**16),
    "rope.freq_base": _positive,
    "rope.freq_base_swa": _positive,
    "rope.scale_linear": number(0, 1e6),  # the older name of rope.scaling.factor
    "rope.scaling.type": text(),
    "rope.scaling.factor": number(0, 1e6),
    "rope.scaling.attn_factor": _positive,
    "rope.scaling.original_context_length": integer(1, 2**31 - 1),
    "rope.scaling.yarn_beta_fast": _positive,
    "rope.scaling.yarn_beta_slow": _positive,
}
# Keys that would change the forward pass of these architectures, and the values at which they do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (1.0,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def read_config(file: GgufFile) -> DecoderConfig:
    """Return the settings in the file's metadata.

    Raises:
      TwlaError: of an unsupported architecture, or a setting is missing, of a wrong type or out of range.
    """
    source = str(file.path)
    architecture = file.require("general.architecture")
    families = by_gguf_architecture(experts=bool(file.get(f"{architecture}.expert_count")))
    if not isinstance(architecture, str) or architecture not in families:
        raise TwlaError(
            f"{source}: architecture {shown(architecture)} is not supported; supported are {', '.join(families)}"
        )
    family = FAMILIES[families[architecture]]
    names = family.gguf_tensors
    get = functools.partial(_prefixed, file.get, architecture)
    require = functools.partial(_prefixed, file.require, architecture)
    for key in ("attention.head_count", "attention.head_count_kv"):
        if isinstance(get(key), list):
            raise TwlaError(f"{source}: a number of heads that differs between layers is not supported")
    check_values(file.metadata, {f"{architecture}.{key}": check for key, check in _CHECKS.items()}, source)
    ends = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
    bos = "tokenizer.ggml.bos_token_id"
    check_values(file.metadata, dict.fromkeys([bos, *ends], integer(0, 2**32 - 1)), source)
    vocab_size = int(file.tensors[names["embed"]].shape[0]) if names["embed"] in file.tensors else 0

    def token(key):  # one that no row has, as 2³² − 1 for none, is passed over, as llama.cpp does
        value = file.get(key)
        return value if value is not None and value < vocab_size else None

    for key, harmless in _REFUSED.items():
        if key not in family.gguf_keys and get(key) is not None and get(key) not in harmless:
            raise TwlaError(f"{source}: {architecture}.{key} {shown(get(key))} is not supported")
    if get("expert_count", 0) and not any(site.experts for site in family.block.sites):
        raise TwlaError(
            f"{source}: {architecture} with {get('expert_count')} experts is not supported, only dense models"
        )
    if names["embed"] not in file.tensors:
        raise TwlaError(f"{source}: tensor {names['embed']!r} is missing")
    hidden, heads = require("embedding_length"), require("attention.head_count")
    layers, kv_heads = require("block_count"), get("attention.head_count_kv", heads)
    head_dim = get("attention.key_length", hidden // heads)
    if head_dim < 1:
        raise TwlaError(f"{source}: {architecture}.embedding_length {hidden} is too small for {heads} heads")
    if get("attention.value_length", head_dim) != head_dim:
        raise TwlaError(f"{source}: keys and values of different sizes are not supported")
    rotated = get("rope.dimension_count", head_dim)
    if rotated != head_dim and ("rope.dimension_count" not in family.gguf_keys or rotated > head_dim):
        raise TwlaError(f"{source}: rotary positions on a part of the head are not supported")
    window = get("attention.sliding_window", 0) or None

    def has(parameter):
        return names.get(parameter, "").format(0) in file.tensors

    settings: dict[str, Any] = {
        "model_type": families[architecture],
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": require("feed_forward_length"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": require("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, get, rotated // 2, require("context_length")),
        "rotary_dim": None if rotated == head_dim else rotated,
        "max_position_embeddings": require("context_length"),
        "tie_word_embeddings": not has("head.kernel"),
        "qkv_bias": has("blocks.q.bias"),
        "o_bias": has("blocks.o.bias"),
        "mlp_bias": has("blocks.gate.bias"),
        "qk_norm": has("blocks.q_norm.scale"),
        "sliding_window": window,
        "sliding_layers": () if window is None else tuple(range(layers)),
        "bos_token_id": token(bos),
        "eos_token_ids": tuple(sorted({each for each in map(token, ends) if each is not None})),
    }
    try:
        own = family.gguf_settings(get, settings)
    except TwlaError as error:
        raise TwlaError(f"{source}: {error}") from None
    return DecoderConfig(**{**settings, **own}).checked(source)


def load_model(file: GgufFile, *, dtype=None, in_files: bool = False) -> Decoder:
    """Return the decoder in the file, parameters as numpy arrays.

    F32, F16 and BF16 tensors keep their type. Block-quantised ones become float32, or float16 where the decoder
    computes in something narrower than float32 anyway.

    Args:
      file: the open file.
      dtype: what it computes in; float32 if None.
      in_files: as `fill_decoder` takes it.

    Raises:
      TwlaError: as `read_config`; a tensor is missing, has the wrong shape, an unknown type, or is not finite.
    """
    config = read_config(file)
    return fill_decoder(
        config,
        family_of(config).gguf_source(_Tensors(file, config, dtype), config),
        family_of(config).gguf_tensors,
        ignored={ROPE_FACTORS, SHORT, LONG},
        dtype=dtype,
        in_files=in_files,
    )


class _Tensors:
    """The file's tensors, dequantised, query and key rows in the order of half-split rotary positions."""

    def __init__(self, file: GgufFile, config: DecoderConfig, dtype):
        self._file = file
        self._blocks_dtype = np.dtype(np.float32 if dtype is None or dtype == jnp.float32 else np.float16)
        self._head_dim = config.head_dim
        # Files of the llama architecture order query and key rows for rotations of neighbouring pairs.
        self._interleaved = ("attn_q.", "attn_k.") if family_of(config).gguf_interleaved else ()

    def names(self) -> Collection[str]:
        return self._file.tensors.keys()

    def where(self, name: str) -> str:
        tensor = self._file.tensors.get(name)
        return str(self._file.path if tensor is None else tensor.path)

    def dtype(self, name: str) -> np.dtype:
        return _FLOATS.get(self._file.tensors[name].kind, self._blocks_dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        tensor = self._file.read(name)
        if any(part in name for part in self._interleaved):
            pairs = tensor.reshape(-1, self._head_dim // 2, 2, *tensor.shape[1:])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        return tensor


def _prefixed(getter, architecture: str, key: str, *default):
    return getter(f"{architecture}.{key}", *default)


def _rope_scaling(file: GgufFile, get: Callable[..., Any], pairs: int, length: int) -> RopeScaling | None:
    """Return the scaling of rotary frequencies, with llama.cpp's defaults: a factor alone means linear.

    Args:
      file: whose tables are read.
      get: returns a setting.
      pairs: of elements that are rotated.
      length: most positions of the model.
    """
    kind = get("rope.scaling.type", "linear")
    tables = [name for name in (ROPE_FACTORS, SHORT, LONG) if name in file.tensors]
    if kind not in ("none", "linear", "yarn") and not (kind == "longrope" and tables):
        raise TwlaError(
            f"{file.path}: rope scaling {shown(kind)} is not supported;"
            f" supported are none, linear, yarn and {ROPE_FACTORS}"
        )
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0)) or 1.0
    if tables and kind not in ("none", "longrope") and factor != 1.0:
        raise TwlaError(f"{file.path}: holds both {tables[0]} and a scaling by {factor:g}")
    of_attention = get("rope.scaling.attn_factor", 1.0)
    # llama.cpp takes two tables for LongRoPE, whatever the type.
    longrope = kind == "longrope" or {SHORT, LONG} & set(tables)
    if of_attention != 1.0 and not longrope and not (kind == "yarn" and factor != 1.0):
        raise TwlaError(
            f"{file.path}: rope.scaling.attn_factor {of_attention:g} is only supported for yarn and longrope"
        )
    if ROPE_FACTORS in file.tensors:
        return RopeScaling(kind="factors", factors=_factors(file, ROPE_FACTORS, pairs))
    original = get("rope.scaling.original_context_length", length)
    if tables:
        return RopeScaling(
            kind="longrope",
            factors=_factors(file, SHORT, pairs),
            long_factors=_factors(file, LONG, pairs),
            original_max_position_embeddings=original,
            factor=length / original,
            attention_factor=of_attention,
        )
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=of_attention * (1 + 0.1 * math.log(factor)),
        beta_fast=get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=get("rope.scaling.yarn_beta_slow", 1.0),
    )


def _factors(file: GgufFile, name: str, pairs: int) -> tuple[float, ...]:
    """Return a tensor of factors that rotary frequencies are divided by.

    Raises:
      TwlaError: it is missing, of another shape, or has a factor that is not positive.
    """
    if name not in file.tensors:
        raise TwlaError(f"{file.path}: tensor {name!r} is missing")
    if file.tensors[name].shape != (pairs,):
        raise TwlaError(f"{file.path}: tensor {name!r} is not a row of {pairs} factors")
    factors = file.read(name)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise TwlaError(f"{file.path}: tensor {name!r} has factors that are not positive")
    return tuple(float(factor) for factor in factors)
