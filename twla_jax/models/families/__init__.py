"""Lists the supported model families: each module holds a family's block, settings and tensor names as data."""

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.config_keys import REFUSED
from twla_jax.models.families import (
    gemma,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo,
    phi,
    qwen,
    qwen_moe,
    smollm3,
)
from twla_jax.models.families.family import Family, HfConfig
from twla_jax.schema import shown

# By the `model_type` of a config.json, and of `DecoderConfig`. A new family is one module and its line here.
FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **mistral.FAMILIES,
    **qwen.FAMILIES,
    **smollm3.FAMILIES,
    **granite.FAMILIES,
    **gemma.FAMILIES,
    **olmo.FAMILIES,
    **phi.FAMILIES,
    **mixtral.FAMILIES,
    **qwen_moe.FAMILIES,
    **gpt_oss.FAMILIES,
}

_OUTSIDE = ("bos_token_id", "eos_token_id", "tie_word_embeddings", *REFUSED)


def family_of(config: DecoderConfig) -> Family:
    """Return the family of a decoder's settings.

    Raises:
      TwlaError: there is none of that name.
    """
    return _family(config.model_type, "these settings")


def config_from_hf(config: HfConfig, *, source: str = "config.json") -> DecoderConfig:
    """Return the settings in a Hugging Face `config.json`, of transformers 4 or 5.

    Args:
      config: the file's contents.
      source: the file's name, for messages.

    Raises:
      TwlaError: an architecture or a setting that no block here has a part for, or a missing key.
    """
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), dict):
        # The text decoder of a model of several modalities; some of its settings stand outside.
        outside = {key: config[key] for key in _OUTSIDE if key in config}
        config = {**outside, **config["text_config"], "model_type": "gemma3_text"}
    return _family(config.get("model_type"), source).read_config(config, source)


def by_gguf_architecture(*, experts: bool = False) -> dict[str, str]:
    """Return the `model_type` of the families that GGUF files come in, by the name these have for them.

    Args:
      experts: whether the file has experts: of two families of one name, the one that has them is meant.
    """
    named = [(family.gguf_architecture, name, family) for name, family in FAMILIES.items()]
    known = {architecture: name for architecture, name, _ in named if architecture is not None}
    meant = {
        architecture: name
        for architecture, name, family in named
        if architecture is not None and any(site.experts for site in family.block.sites) == experts
    }
    return known | meant


def _family(model_type: object, source: str) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise TwlaError(
            f"{source}: architecture {shown(model_type)} is not supported; supported are {supported}"
        )
    return FAMILIES[model_type]
