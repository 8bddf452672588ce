"""Rotary position embeddings (arXiv 2104.09864), on the two halves of a head."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from twla_jax.models.config import DecoderConfig, RopeScaling


def inverse_frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    """Angle per position of each pair of features, float32, after the scaling the config asks for.

    `θ_i = rope_theta^(−2i/d)`; linear: `θ/factor`; llama3: `θ/factor` where the wavelength is above
    `original/low_freq_factor`, θ where it is below `original/high_freq_factor`, between them blended linearly in
    `original/wavelength`.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    if config.rope_scaling is not None:
        frequencies = _scaled(frequencies, config.rope_scaling)
    return frequencies.astype(np.float32)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        return frequencies / np.asarray(scaling.factors, np.float32)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def angles(
    config: DecoderConfig, positions: Int[Array, " t"]
) -> tuple[Float[Array, "t half"], Float[Array, "t half"]]:
    """`(cos, sin)` of every position, float32."""
    angle = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)
