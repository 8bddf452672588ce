"""Attention to parts of the positions, left apart for whoever reads the mix."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

LEAST_SUM = 1e-30  # in place of the sum of a softmax over no position


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionParts:
    """The mix of the values of each part, and that part's softmax.

    `softmax` has the largest score s of a part, in powers of two, and the sum of `2^(score − s)`; the whole mix is the
    parts', each weighed by `sum · 2^s`.
    """

    mixed: Float[Array, "tokens parts heads_d"]
    softmax: Float32[Array, "tokens parts heads 2"]

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.mixed.shape[-1] // self.softmax.shape[-2]

    def merged(self) -> Float[Array, "tokens heads_d"]:
        """The mix over all positions."""
        top, total = self.softmax[..., 0], self.softmax[..., 1]
        share = total * jnp.exp2(top - top.max(1, keepdims=True))
        weight = share / jnp.maximum(share.sum(1, keepdims=True), LEAST_SUM)
        parts = self.mixed.astype(jnp.float32).reshape(*weight.shape, self.head_dim)
        return (parts * weight[..., None]).sum(1).reshape(len(parts), -1).astype(self.mixed.dtype)
