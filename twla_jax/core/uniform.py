"""Plain asymmetric integers, what ternary weights are compared with: the levels of round-to-nearest and GPTQ."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16, Int, UInt8

_SHRINKS = 80  # candidates for the range, from the whole of it down to a fifth
_NORM = 2.4  # of the error that a range is chosen by, as in GPTQ's public code


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerTensor:
    """An integer weight matrix, rows are outputs: `Ŵ[i, k] = scale[i, k // G]·(codes[i, k] − zero_point[i, k // G])`.

    Invariants: codes and zero points lie in `[0, 2**bits)`, one a byte here and `bits` bits each on disk; `scale` and
    `zero_point` have `ceil(in_features / group_size)` columns. Leading axes are shared by the three arrays.
    """

    codes: UInt8[Array, "*batch n m"]
    scale: Float16[Array, "*batch n groups"]
    zero_point: UInt8[Array, "*batch n groups"]
    in_features: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., n, m]`, the shape of the matrix it stands for."""
        return (*self.codes.shape[:-1], self.in_features)

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "*batch n m"]:
        """The matrix `Ŵ` in `dtype`."""
        scale, zero = (
            per_column(p.astype(dtype), self.in_features, self.group_size)
            for p in (self.scale, self.zero_point)
        )
        return scale * (self.codes.astype(dtype) - zero)


def take_rows(
    table: Float[Array, "n m"] | IntegerTensor, rows: Int[Array, "*shape"], dtype
) -> Float[Array, "*shape m"]:
    """Some rows of a matrix, in `dtype`; of integers, only these are made floats."""
    taken = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], table)
    return (taken.dequantize() if isinstance(taken, IntegerTensor) else taken).astype(dtype)


def fit_range(
    w: Float[Array, "n g"], mask: Bool[Array, " g"], bits: int
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """`(scale, zero_point)` of each row of one group: the shrunken range, zero in it, with the least `Σ|w − ŵ|^2.4`.

    The range search of GPTQ's public code (arXiv 2210.17323). The scale is rounded to float16 before it is judged.
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


def nearest_code(w, scale, zero_point, bits: int) -> Float[Array, "*shape"]:
    """The code in `[0, 2**bits)` whose value `scale·(q − z)` lies nearest to w."""
    return jnp.clip(jnp.round(w / scale) + zero_point, 0, 2**bits - 1)


def per_column(
    parameter: Float[Array, "*batch n groups"], in_features: int, group_size: int
) -> Float[Array, "*batch n m"]:
    """A parameter of every group, repeated for each of the group's columns."""
    repeated = jnp.broadcast_to(parameter[..., None], (*parameter.shape, group_size))
    return repeated.reshape(*parameter.shape[:-1], -1)[..., :in_features]
