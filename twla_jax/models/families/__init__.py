"""The supported model families: one module each, which holds its block, its settings and its tensors' names as data."""

from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.families import llama, mistral, qwen
from twla_jax.models.families.family import Family, HfConfig
from twla_jax.schema import shown

# By the `model_type` of a config.json, and of `DecoderConfig`. A new family is one module and its line here.
FAMILIES: dict[str, Family] = {**llama.FAMILIES, **mistral.FAMILIES, **qwen.FAMILIES}


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
    return _family(config.get("model_type"), source).read_config(config, source)


def by_gguf_architecture() -> dict[str, Family]:
    """Return the families that GGUF files come in, by the name these have for them."""
    return {family.gguf_architecture: family for family in FAMILIES.values() if family.gguf_architecture}


def _family(model_type: object, source: str) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise TwlaError(
            f"{source}: architecture {shown(model_type)} is not supported; supported are {supported}"
        )
    return FAMILIES[model_type]
