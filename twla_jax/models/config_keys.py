"""Lists the keys of a Hugging Face `config.json`: which are read, which are refused, and which change nothing.

Every key of the configuration classes of the supported families is in one of the three tables, so that none is passed
over unseen. Values of the first two are checked before anything is computed from them.
"""

from collections.abc import Mapping
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.schema import (
    Check,
    boolean,
    check_values,
    either,
    integer,
    mapping,
    number,
    one_of,
    optional,
    sequence,
    shown,
    text,
)

_size = integer(1, 2**24)
_heads = integer(1, 2**16)
_token = integer(-(2**31), 2**31 - 1)
MOST_LAYERS = 4096
KINDS_OF_LAYER = ("full_attention", "sliding_attention")

READ: dict[str, Check] = {
    "model_type": text(),
    "vocab_size": integer(1, 2**26),
    "hidden_size": _size,
    "intermediate_size": _size,
    "num_hidden_layers": integer(1, MOST_LAYERS),
    "num_attention_heads": _heads,
    "num_key_value_heads": optional(_heads),
    "head_dim": optional(integer(2, 2**16)),
    "hidden_act": one_of("silu", "swish"),
    "max_position_embeddings": integer(1, 2**31 - 1),
    "rms_norm_eps": number(0, 1, above=True),
    "tie_word_embeddings": boolean(),
    "rope_parameters": optional(mapping(longest=64)),
    "rope_scaling": optional(mapping(longest=64)),  # of transformers 4
    "rope_theta": optional(number(0, 1e30, above=True)),  # of transformers 4
    "original_max_position_embeddings": optional(integer(1, 2**31 - 1)),
    "attention_bias": boolean(),
    "mlp_bias": boolean(),
    "sliding_window": optional(integer(1, 2**31 - 1)),
    "use_sliding_window": boolean(),
    "max_window_layers": integer(0, 2**31 - 1),
    "layer_types": optional(sequence(one_of(*KINDS_OF_LAYER), longest=MOST_LAYERS)),
    "bos_token_id": optional(_token),
    "eos_token_id": optional(either(_token, sequence(_token, longest=4096))),
}

# Refused unless they have the value that changes nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (None, False),
    "per_layer_config": (None,),
}

# The `quantization_config` of weights in eight bits, which are read: what transformers takes where it is silent.
FLOAT8: dict[str, Any] = {
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "scale_fmt": "float",
}
_side = integer(1, 2**24)
_FLOAT8_CHECKS: dict[str, Check] = {
    "weight_block_size": optional(sequence(_side, longest=2, shortest=2)),
    "activation_scheme": one_of("dynamic", "static"),
    "scale_fmt": one_of("float", "ue8m0"),
    "fmt": one_of("e4m3", "e5m2", "float8_e4m3fn", "float8_e5m2"),
}

# Read by nothing: training, caching, bookkeeping, and what transformers itself passes over for these families.
WITHOUT_EFFECT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "chunk_size_feed_forward",  # saves memory, computes the same
        "embd_pdrop",
        "resid_pdrop",
        "dtype",  # weights keep the type they are stored in
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",  # transformers 5 computes with whole matrices whatever it says
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def check_keys(
    config: Mapping[str, Any],
    source: str,
    of_family: Mapping[str, Check] | None = None,
    *,
    mxfp4: bool = False,
) -> None:
    """Check types and ranges of all keys, and refuse what would change the forward pass unseen.

    Args:
      config: contents of a `config.json`.
      source: the file's name, for messages.
      of_family: checks of keys that only this family reads, or that have other values there.
      mxfp4: whether its experts may be in MXFP4.

    Raises:
      TwlaError: the first key that is wrong, by name.
    """
    of_family = of_family or {}
    check_values(config, {**READ, **of_family}, source)
    for key, harmless in REFUSED.items():
        if key in of_family:
            continue
        value = config.get(key)
        if key in config and not any(value is item or value == item for item in harmless):
            if key == "quantization_config" and mxfp4 and is_mxfp4(config):
                continue
            if key == "quantization_config" and (settings := float8_settings(config)) is not None:
                check_values(settings, _FLOAT8_CHECKS, f"{source}: quantization_config")
                continue
            if key in ("quantization_config", "compression_config"):
                raise TwlaError(f"{source}: {already_quantized(value)}")
            wanted = " or ".join(map(shown, harmless[1:]))
            raise TwlaError(f"{source}: {key} {shown(value)} is not supported, only {wanted}")


def float8_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the `quantization_config` of a `config.json` if it is that of weights in eight bits, else None."""
    settings = config.get("quantization_config")
    return settings if isinstance(settings, Mapping) and settings.get("quant_method") == "fp8" else None


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether the `quantization_config` of a `config.json` says that experts are in MXFP4, which is read."""
    settings = config.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == "mxfp4"


def already_quantized(settings: Any) -> str:
    """Return the sentence that refuses a model whose weights are quantised already, with the method it names."""
    settings = settings if isinstance(settings, Mapping) else {}
    method = settings.get("quant_method")
    name = method if isinstance(method, str) and len(method) < 40 else "an unnamed method"
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") is True else None)
    width = f", {bits} bits" if isinstance(bits, int) and 0 < bits < 33 else ""
    return f"its weights are quantised already ({name}{width}); bring the model in 16 or 32 bits"
