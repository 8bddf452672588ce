"""Groups heads, and divides positions, for attention on TPUs.

Eight queries fill a register, so key heads that have eight together are a group, which is multiplied at once: of the
left operand, a head's columns are zero but in its own queries' rows, so one sum over features and heads is all scores.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Num

LANES = 128
_SUBLANES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupShape:
    """Describes how heads are grouped, and positions divided into blocks: of a multiple of 128, the last one cut."""

    heads: int
    kv_heads: int
    size: int
    block: int

    @property
    def shared(self) -> int:
        """Return the queries of a key head."""
        return self.heads // self.kv_heads

    @property
    def together(self) -> int:
        """Return the key heads of a group."""
        most = max(1, _SUBLANES // self.shared)
        return next(n for n in range(most, 0, -1) if self.kv_heads % n == 0)

    @property
    def groups(self) -> int:
        """Return the number of groups."""
        return self.kv_heads // self.together

    @property
    def rows(self) -> int:
        """Return the rows of a group's queries, filled up."""
        return -(-self.together * self.shared // _SUBLANES) * _SUBLANES

    def visible(
        self, length: jax.Array, window: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return the first and the last visible position, and the blocks that these are in."""
        first = jnp.maximum(length + 1 - window, 0)
        block = jnp.int32(self.block)
        return first, length, lax.div(first, block), lax.div(length, block)

    def heads_of(self, group: int) -> range:
        """Return the key heads of a group."""
        return range(group * self.together, (group + 1) * self.together)

    def apart(self, x: Num[Array, "rows n"]) -> Num[Array, "rows together_n"]:
        """Return x once for each head of a group, side by side, with zeros but in that head's rows."""
        head = lax.div(lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0), jnp.int32(self.shared))
        return jnp.concatenate([jnp.where(head == n, x, jnp.zeros_like(x)) for n in range(self.together)], 1)

    def by_row(self, of_heads: Sequence[Float32[Array, "1 n"]]) -> Float32[Array, "rows n"]:
        """Return what each head of a group has, in the rows of its queries; other rows have anything."""
        rest = self.rows - self.together * self.shared
        counts = [self.shared] * (self.together - 1) + [self.shared + rest]
        each = zip(of_heads, counts, strict=True)
        return jnp.concatenate([jnp.broadcast_to(x, (count, x.shape[1])) for x, count in each])


def block_size(kv_heads: int, size: int, position_bytes: int, most: int) -> int:
    """Return the positions of a block, of which the fewest lie past the end.

    Args:
      kv_heads: of a sequence.
      size: positions of the cache.
      position_bytes: of a key.
      most: bytes of a block's keys.
    """
    largest = max(1, most // (kv_heads * position_bytes * LANES))
    return min(range(largest, 0, -1), key=lambda n: -(-size // (n * LANES)) * n) * LANES
