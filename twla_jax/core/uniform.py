"""Fits plain asymmetric integers, the levels of round-to-nearest and GPTQ, to compare ternary weights with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_SHRINKS = 80  # candidates for the range, from the whole of it down to a fifth
_NORM = 2.4  # of the error that a range is chosen by, as in GPTQ's public code


def fit_range(
    w: Float[Array, "n g"], mask: Bool[Array, " g"], bits: int
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Return `(scale, zero_point)`, `[n]` each: of every row the range, zero in it, with the least `Σ|w − ŵ|^2.4`.

    The range search of GPTQ's public code (arXiv 2210.17323). The scale is rounded to float16 before it is judged.

    Args:
      w: weights of one group, a row an output.
      mask: which columns exist.
      bits: of an integer.
    """
    levels = 2**bits - 1
    w = jnp.where(mask, w, 0)
    low, high = jnp.minimum(w.min(-1), 0), jnp.maximum(w.max(-1), 0)

    def settings(shrink):
        scale = ((high - low) * shrink / levels).astype(jnp.float16).astype(jnp.float32)
        scale = jnp.maximum(scale, jnp.finfo(jnp.float16).tiny)
        return scale, jnp.clip(jnp.round(-low * shrink / scale), 0, levels)

    def step(best, shrink):
        scale, zero = settings(shrink)
        codes = nearest_code(w, scale[:, None], zero[:, None], bits)
        error = jnp.where(mask, jnp.abs(w - scale[:, None] * (codes - zero[:, None])) ** _NORM, 0).sum(-1)
        better = error < best[0]
        return tuple(
            jnp.where(better, new, old) for new, old in zip((error, scale, zero), best, strict=True)
        ), None

    start = (jnp.full(len(w), jnp.inf), *settings(1.0))
    (_, scale, zero), _ = jax.lax.scan(step, start, 1 - jnp.arange(_SHRINKS) / 100)
    return scale, zero


def nearest_code(
    w: Float[Array, "*shape"],
    scale: Float[Array, "*#shape"],
    zero_point: Float[Array, "*#shape"],
    bits: int,
) -> Float[Array, "*shape"]:
    """Return the code in `[0, 2**bits)` whose value `scale·(q − z)` lies nearest to w, in the shape of w."""
    return jnp.clip(jnp.round(w / scale) + zero_point, 0, 2**bits - 1)
