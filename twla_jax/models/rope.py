"""Rotary position embeddings (arXiv 2104.09864), on the two halves of a head."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from twla_jax.models.config import DecoderConfig
from twla_jax.models.rope_settings import RopeScaling


def inverse_frequencies(config: DecoderConfig, *, long: bool = False) -> Float[np.ndarray, " half"]:
    """Returns the angle per position of each pair of features, float32, after the scaling the config asks for.

    `θ_i = rope_theta^(−2i/d)`; linear: `θ/factor`; llama3: `θ/factor` where the wavelength is above
    `original/low_freq_factor`, θ where it is below `original/high_freq_factor`, between them blended linearly in
    `original/wavelength`; yarn: `θ/factor` and θ blended linearly in i, between the pairs that turn `beta_fast` and
    `beta_slow` times within the original context.

    Args:
      long: of longrope, the factors for more positions than originally.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    if config.rope_scaling is not None:
        frequencies = _scaled(frequencies, config, config.rope_scaling, long=long)
    return frequencies.astype(np.float32)


def _scaled(
    frequencies: np.ndarray, config: DecoderConfig, scaling: RopeScaling, *, long: bool
) -> np.ndarray:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind in ("factors", "longrope"):
        return frequencies / np.asarray(scaling.long_factors if long else scaling.factors, np.float32)
    if scaling.kind == "yarn":
        divided = _yarn_ramp(config, scaling)
        return divided * frequencies / scaling.factor + (1 - divided) * frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn_ramp(config: DecoderConfig, scaling: RopeScaling) -> np.ndarray:
    """Returns how much of each pair's frequency is divided: 0 for the fast ones, 1 for the slow ones."""

    def pair(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (np.arange(config.head_dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    return np.clip(ramp, 0, 1)


def angles(
    config: DecoderConfig, positions: Int[Array, " t"]
) -> tuple[Float[Array, "t half"], Float[Array, "t half"]]:
    """Returns `(cos, sin)` of every position, float32, times the scaling's attention factor."""
    frequencies, scaling = inverse_frequencies(config), config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        beyond = positions.max() >= scaling.original_max_position_embeddings
        frequencies = jnp.where(beyond, inverse_frequencies(config, long=True), frequencies)
    angle = positions.astype(jnp.float32)[:, None] * frequencies
    factor = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor
