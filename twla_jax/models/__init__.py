"""Defines one decoder for several families, and reads the files that models come in."""

from twla_jax.models.blocks import ChainBlock, Site
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import FAMILIES, Family

__all__ = ["FAMILIES", "ChainBlock", "Decoder", "DecoderConfig", "Family", "Site"]
