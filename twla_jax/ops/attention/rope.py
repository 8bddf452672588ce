"""Applies rotary positions to queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "b t heads d"], cos: Float[Array, "*b t half"], sin: Float[Array, "*b t half"]
) -> Float[Array, "b t heads d"]:
    """Rotate each pair `(x_i, x_{i + half})` by its angle, in float32, and return it in `x.dtype`.

    Where there are fewer angles than pairs, the features after the first `2 · half` stay as they are.
    """
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(
        x.dtype
    )
