"""Models: one decoder, and readers for the files it comes in."""

from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import SITES, Decoder

__all__ = ["SITES", "Decoder", "DecoderConfig"]
