"""Sorts tokens by the expert that they go to, into blocks of one expert each, whose number is known beforehand."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

_MOST_SINGLE = (
    64  # choices up to which each is a block of its own: sorting them would take longer than it saves
)
_SIZES = (8, 16, 32, 64, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertBlocks:
    """Says where each choice of a token for an expert is computed: `count` blocks of `size` rows.

    Attributes:
      places: the row of each choice.
      choices: the choice in each row; `len(places)` in rows that only fill up a block.
      experts: the expert of each block.
      size: rows of a block.
    """

    places: Int32[Array, " choices"]
    choices: Int32[Array, " rows"]
    experts: Int32[Array, " count"]
    size: int = dataclasses.field(metadata={"static": True})

    def gather(self, x: Array, repeats: int = 1) -> Array:
        """Return `[count, size, *rest]`: each row's choice of x, zero where there is none.

        Args:
          x: `[choices / repeats, *rest]`, by choice, or by token where each has `repeats` choices.
          repeats: choices of a row of x.
        """
        rows = jnp.take(x, self.choices // repeats, axis=0, mode="fill", fill_value=0)
        return rows.reshape(-1, self.size, *x.shape[1:])

    def scatter(self, y: Float[Array, "count size n"]) -> Float[Array, "choices n"]:
        """Return the row of each choice."""
        return y.reshape(-1, y.shape[-1])[self.places]


def block_size(choices: int, experts: int, least: int = 1, most: int | None = None) -> int:
    """Return the rows of a block: about the choices of an expert, so that few rows only fill up.

    Args:
      choices: of all tokens together.
      experts: how many there are.
      least: rows that a kernel takes at once.
      most: rows that it can.
    """
    if choices <= _MOST_SINGLE:
        return least
    size = max(least, next((size for size in _SIZES if size * experts >= choices), _SIZES[-1]))
    return size if most is None else min(size, most)


def expert_blocks(chosen: Int32[Array, " choices"], experts: int, size: int) -> ExpertBlocks:
    """Return the blocks of some choices.

    Args:
      chosen: the expert of each choice.
      experts: how many there are.
      size: rows of a block.
    """
    choices = len(chosen)
    if choices <= _MOST_SINGLE:
        places = size * jnp.arange(choices, dtype=jnp.int32)
        return _blocks(places, chosen, choices, size)
    counts = jnp.zeros(experts, jnp.int32).at[chosen].add(1)
    ends = jnp.cumsum(-(-counts // size))  # in blocks
    order = jnp.argsort(chosen)
    expert = chosen[order]
    rank = jnp.arange(choices, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[expert]
    first = size * (ends - -(-counts // size))
    places = jnp.zeros(choices, jnp.int32).at[order].set(first[expert] + rank)
    used = min(choices, experts)  # each of which may fill up a block
    count = min(choices, (choices + used * (size - 1)) // size)
    of_block = jnp.searchsorted(ends, jnp.arange(count, dtype=jnp.int32), side="right")
    return _blocks(places, jnp.minimum(of_block, experts - 1).astype(jnp.int32), count, size)


def _blocks(places: jax.Array, experts: jax.Array, count: int, size: int) -> ExpertBlocks:
    choices = len(places)
    of_row = jnp.full(count * size, choices, jnp.int32)
    of_row = of_row.at[places].set(jnp.arange(choices, dtype=jnp.int32))
    return ExpertBlocks(places=places, choices=of_row, experts=experts, size=size)
