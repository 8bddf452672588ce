"""Holds attention that is computed in splits of the positions, which the reader merges."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

LEAST_SUM = 1e-30  # replaces the sum of a softmax over no position


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSplits:
    """Holds the mix of the values over each split of the positions, and the state of that split's softmax.

    `softmax` holds the largest score s of a split, in powers of two, and the sum of `2^(score − s)`. The mix over all
    positions is the average of the splits' mixes, each weighted by `sum · 2^s`.
    """

    mixed: Float[Array, "tokens splits heads_d"]
    softmax: Float32[Array, "tokens splits heads 2"]

    @property
    def head_dim(self) -> int:
        """Return the number of features of a head."""
        return self.mixed.shape[-1] // self.softmax.shape[-2]

    def merged(self) -> Float[Array, "tokens heads_d"]:
        """Return the mix over all positions."""
        top, total = self.softmax[..., 0], self.softmax[..., 1]
        share = total * jnp.exp2(top - top.max(1, keepdims=True))
        weight = share / jnp.maximum(share.sum(1, keepdims=True), LEAST_SUM)
        mixed = self.mixed.astype(jnp.float32).reshape(*weight.shape, self.head_dim)
        return (mixed * weight[..., None]).sum(1).reshape(len(mixed), -1).astype(self.mixed.dtype)
