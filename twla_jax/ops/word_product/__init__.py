"""Multiplies one token by integer weights that lie in 32-bit words, as XLA's CPU back end reads them fastest."""

from twla_jax.ops.word_product.api import word_product
from twla_jax.ops.word_product.pack import word_weight
from twla_jax.ops.word_product.weight import WordWeight, fits_words, word_bytes

__all__ = ["WordWeight", "fits_words", "word_bytes", "word_product", "word_weight"]
