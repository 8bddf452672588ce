"""Decides which experts each token goes to."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Holds the k experts of each token, the likeliest first, and what their outputs are multiplied by."""

    experts: Int32[Array, "b t k"]
    weights: Float[Array, "b t k"]
