"""Computes rotary position embeddings (arXiv 2104.09864), on the two halves of a head."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from twla_jax.models.config import DecoderConfig
from twla_jax.models.rope_settings import RopeScaling


def inverse_frequencies(config: DecoderConfig, *, long: bool = False) -> Float[np.ndarray, " half"]:
    """Return the angle per position of each pair of features, float32, after the scaling the config asks for.

    `θ_i = rope_theta^(−2i/d)`; linear: `θ/factor`; llama3: `θ/factor` where the wavelength is above
    `original/low_freq_factor`, θ where it is below `original/high_freq_factor`, between them blended linearly in
    `original/wavelength`; yarn: `θ/factor` and θ blended linearly in i, between the pairs that turn `beta_fast` and
    `beta_slow` times within the original context.

    Args:
      config: settings of the decoder.
      long: of longrope, the factors for more positions than originally.
    """
    frequencies = _plain(config.rope_theta, config.rotary_dim or config.head_dim)
    if config.rope_scaling is not None:
        frequencies = _scaled(frequencies, config, config.rope_scaling, long=long)
    return frequencies.astype(np.float32)


def _plain(theta: float, size: int) -> Float[np.ndarray, " half"]:
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


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
    """Return how much of each pair's frequency is divided: 0 for the fast ones, 1 for the slow ones."""
    size = config.rotary_dim or config.head_dim

    def pair(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (np.arange(size // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    return np.clip(ramp, 0, 1)


def angles(
    config: DecoderConfig, positions: Int[Array, "*b t"], until: Int[Array, ""] | None = None
) -> tuple[Float[Array, "*kinds_b t half"], Float[Array, "*kinds_b t half"]]:
    """Return `(cos, sin)` of every position, float32, times the scaling's attention factor.

    Positions may have a leading axis of rows. Where not all layers have the same angles, there is a leading axis of
    three kinds, which `rotary_kinds` chooses from: the scaled ones, those of the sliding layers, and those that rotate
    nothing.

    Args:
      config: settings of the decoder.
      positions: of the tokens.
      until: positions of the text that they are a part of, by which LongRoPE chooses its factors; those up to the last
        of them if None.
    """
    frequencies, scaling = inverse_frequencies(config), config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        until = positions.max(-1)[..., None, None] + 1 if until is None else until
        beyond = until > scaling.original_max_position_embeddings
        frequencies = jnp.where(beyond, inverse_frequencies(config, long=True), frequencies)
    angle = positions.astype(jnp.float32)[..., None] * frequencies
    factor = 1.0 if scaling is None else scaling.attention_factor
    cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
    if rotary_kinds(config) is None:
        return cos, sin
    local = _plain(config.sliding_rope_theta or config.rope_theta, config.rotary_dim or config.head_dim)
    local_angle = positions.astype(jnp.float32)[..., None] * local
    return (
        jnp.stack([cos, jnp.cos(local_angle), jnp.ones_like(cos)]),
        jnp.stack([sin, jnp.sin(local_angle), jnp.zeros_like(sin)]),
    )


def rotary_kinds(config: DecoderConfig) -> Int[np.ndarray, " layers"] | None:
    """Return which angles each layer has: 0 the scaled ones, 1 those of sliding layers, 2 none; None if all have 0."""
    kinds = np.zeros(config.num_layers, np.int32)
    if config.sliding_rope_theta is not None:
        kinds[list(config.sliding_layers)] = 1
    kinds[list(config.no_rope_layers)] = 2
    return kinds if kinds.any() else None
