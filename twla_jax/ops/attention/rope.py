"""Applies rotary positions to queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "b t heads d"], cos: Float[Array, "t half"], sin: Float[Array, "t half"]
) -> Float[Array, "b t heads d"]:
    """Rotate each pair `(x_i, x_{i + d/2})` by its angle, in float32, and return it in `x.dtype`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
