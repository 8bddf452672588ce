"""Holds packed weight matrices, ternary planes and plain integers, and multiplies by them."""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float16, Float32, Int, Int8, UInt8

from twla_jax.core import packing
from twla_jax.core.arrays import AnyArray

_HIGHEST = jax.lax.Precision.HIGHEST
RATIO_STEPS = 200  # of α₂/α₁ to 1: a byte reaches 1.275, so that a refined α₂ may pass α₁
_SMALLEST_STEP = 2.0**-21  # float16 holds eight times less, and so every multiple of steps of 4 bits


@runtime_checkable
class Dequantizable(Protocol):
    """A packed weight matrix that knows its own way back."""

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*rows m"]:
        """Return the matrix `Ŵ` in `dtype`."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerTensor:
    """An integer weight matrix, rows are outputs: `Ŵ[i, k] = scale[i, k // G]·(codes[i, k] − zero_point[i, k // G])`.

    Invariants: codes and zero points lie in `[0, 2**bits)`, one a byte here and `bits` bits each on disk; `scale` and
    `zero_point` have `ceil(in_features / group_size)` columns. Leading axes are shared by the three arrays.
    """

    __no_type_check__: ClassVar[bool] = True  # a pytree may hold shardings or shapes in place of its arrays

    codes: UInt8[Array, "*batch n m"]
    scale: Float16[Array, "*batch n groups"]
    zero_point: UInt8[Array, "*batch n groups"]
    in_features: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Return `[..., n, m]`, the shape of the matrix it stands for."""
        return (*self.codes.shape[:-1], self.in_features)

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "*rows m"]:
        """Return the matrix `Ŵ`, `[..., n, m]`, in `dtype`."""
        scale, zero = (
            per_column(p.astype(dtype), self.in_features, self.group_size)
            for p in (self.scale, self.zero_point)
        )
        return scale * (self.codes.astype(dtype) - zero)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TernaryTensor:
    """A ternary weight matrix, rows are outputs: `Ŵ[i, k] = alpha[i, k // G]·T[i, k] + mu[i, k // G]`.

    With a second plane, `residual_alpha[i, k // G]·T₂[i, k]` is added, `T₂` packed in `residual_codes` and its α a
    multiple of the first one's, `alpha·residual_ratio/200`; with one plane the three are None. Symmetric planes have no
    offsets: their `mu` is None.

    Invariants: codes pack `T + 1` as `packing.pack` does; α and μ have `ceil(in_features / group_size)` columns, the
    last group being short where the group size does not divide. Leading axes (a stack of layers, say) are shared by
    all arrays.
    """

    __no_type_check__: ClassVar[bool] = True  # a pytree may hold shardings or shapes in place of its arrays

    codes: UInt8[Array, "*batch n bytes"]
    alpha: Float16[Array, "*batch n groups"]
    in_features: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    mu: Float16[Array, "*batch n groups"] | None = None
    residual_codes: UInt8[Array, "*batch n bytes"] | None = None
    residual_ratio: UInt8[Array, "*batch n groups"] | None = None

    @property
    def residual_alpha(self) -> Float32[Array, "*batch n groups"] | None:
        """Return α of the second plane, float32, `[..., n, groups]`; None where there is none."""
        if self.residual_ratio is None:
            return None
        ratio = jnp.asarray(self.residual_ratio, jnp.float32) / RATIO_STEPS
        return jnp.asarray(self.alpha, jnp.float32) * ratio

    def offsets(self) -> Float16[Array, "*batch n groups"]:
        """Return μ, `[..., n, groups]`, as zeros where none is held."""
        return jnp.zeros(self.alpha.shape, self.alpha.dtype) if self.mu is None else self.mu

    def planes(self) -> tuple["TernaryTensor", ...]:
        """Return tensors of one plane each that add up to this one; the first has its μ, the second none."""
        residual_alpha = self.residual_alpha
        if self.residual_codes is None or residual_alpha is None:
            return (self,)
        first = dataclasses.replace(self, residual_codes=None, residual_ratio=None)
        alpha = residual_alpha.astype(self.alpha.dtype)
        return first, dataclasses.replace(first, codes=self.residual_codes, alpha=alpha, mu=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return `[..., n, m]`, the shape of the matrix it stands for."""
        return (*self.codes.shape[:-1], self.in_features)


def dequantize(weight: "TernaryTensor | Dequantizable", dtype=jnp.float32) -> Float[Array, "*rows m"]:
    """Return the matrix `Ŵ`, `[..., n, m]`, in `dtype`; α and μ are applied in `dtype`."""
    if not isinstance(weight, TernaryTensor):
        return weight.dequantize(dtype)

    def spread(parameter):
        return per_column(parameter.astype(dtype), weight.in_features, weight.group_size)

    def scaled(codes, alpha):
        return (packing.unpack(codes, weight.in_features).astype(dtype) - 1) * spread(alpha)

    dense = scaled(weight.codes, weight.alpha)
    if weight.mu is not None:
        dense += spread(weight.mu)
    if weight.residual_codes is not None:
        dense += scaled(weight.residual_codes, weight.residual_alpha)
    return dense


def packed_matmul(
    x: Float[AnyArray, "*tokens m"], weight: "TernaryTensor | Dequantizable"
) -> Float[Array, "*tokens n"]:
    """Return `x Ŵᵀ`, `[..., n]`, in `x.dtype`, accumulated in float32; unpacks this one matrix.

    float32 inputs are multiplied in true float32, also on chips whose default is narrower.
    """
    precision = _HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.einsum(
        "...m,nm->...n",
        x,
        dequantize(weight, x.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


def from_codes(
    codes: Int8[AnyArray, "*batch n m"],
    alpha: Float[AnyArray, "*batch n groups"],
    mu: Float[AnyArray, "*batch n groups"] | None,
    group_size: int,
    residual_codes: Int8[AnyArray, "*batch n m"] | None = None,
    residual_alpha: Float[AnyArray, "*batch n groups"] | None = None,
) -> TernaryTensor:
    """Return the `TernaryTensor` of codes in {-1, 0, 1} and scales: α, μ as float16, α₂ as a byte's share of α."""
    residual_ratio = None if residual_alpha is None else nearest_ratio(alpha, residual_alpha)
    return TernaryTensor(
        residual_codes=None if residual_codes is None else packing.pack(residual_codes),
        residual_ratio=None if residual_ratio is None else residual_ratio.astype(jnp.uint8),
        codes=packing.pack(codes),
        alpha=jnp.asarray(alpha, jnp.float16),
        mu=None if mu is None else jnp.asarray(mu, jnp.float16),
        in_features=codes.shape[-1],
        group_size=group_size,
    )


def in_whole_steps(
    alpha: Float[AnyArray, "*rows groups"], mu: Float[AnyArray, "*rows groups"] | None, group_size: int
) -> tuple[Float[Array, "*rows groups"], Float[Array, "*rows groups"] | None]:
    """Return α and μ, rounded to whole numbers of their row's step; as they are where kernels add up no groups."""
    scales = jax.tree.map(jnp.asarray, (alpha, mu))
    if alpha.shape[-1] == 1 or group_size % packing.PLANE:
        return scales
    step = row_steps(alpha, mu)[..., None]
    return jax.tree.map(lambda each: jnp.round(each / step) * step, scales)


def row_steps(
    alpha: Float[AnyArray, "*rows groups"], mu: Float[AnyArray, "*rows groups"] | None
) -> Float32[Array, "*rows"]:
    """Return a step for each row, in which its weights `±α + μ` are whole numbers from −127 to 127 once rounded.

    Such weights add up in integers across groups. Rounding moves α and μ by less than 0.45 % of the row's largest
    |α| + |μ|, far below the error of three levels. Steps have 4 bits, so that float16 holds 7 bits of them. Of α and
    μ that are rounded already, it is the step to which they were. Without μ, weights are ±α.
    """
    scales = jnp.stack(jax.tree.leaves((alpha, mu))).astype(jnp.float32)
    largest = jnp.max(jnp.abs(scales).sum(0), axis=-1)
    # One less than int8 holds, as two are rounded.
    mantissa, exponent = jnp.frexp(jnp.maximum(largest / 126, _SMALLEST_STEP))
    sixteenths = jnp.ceil(16 * mantissa)

    def off(step):
        parts = scales / step[..., None]
        error = jnp.max(jnp.abs(parts - jnp.round(parts)), axis=(0, -1))
        return jnp.where(largest < 127.01 * step, error, jnp.inf)

    # By rounding, a row's largest may have crossed to the step before or after.
    below = jnp.where(sixteenths > 8, sixteenths - 1, 7.5)
    above = jnp.where(sixteenths < 16, sixteenths + 1, 18)
    steps = jnp.stack([jnp.ldexp(each / 16, exponent) for each in (sixteenths, below, above)])
    exact = jax.vmap(off)(steps) < 1e-3
    return jnp.where(exact.any(0), jnp.take_along_axis(steps, exact.argmax(0)[None], 0)[0], steps[0])


def nearest_ratio(
    alpha: Float[AnyArray, "*shape"], residual_alpha: Float[AnyArray, "*shape"]
) -> Float[Array, "*shape"]:
    """Return `α₂/α` in whole steps of 1/200 that fit a byte, for the float16 α that is stored."""
    stored = alpha.astype(jnp.float16).astype(jnp.float32)
    ratio = residual_alpha / jnp.where(stored == 0, jnp.inf, stored)
    return jnp.clip(jnp.round(RATIO_STEPS * ratio), 0, 255)


def take_rows(
    table: Float[AnyArray, "n m"] | IntegerTensor, rows: Int[AnyArray, "*shape"], dtype
) -> Float[Array, "*shape m"]:
    """Return some rows of a matrix, `[..., m]` in `dtype`; of integers, only these are made floats."""
    taken = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], table)
    return (taken.dequantize() if isinstance(taken, IntegerTensor) else taken).astype(dtype)


def per_column(
    parameter: Float[AnyArray, "*batch groups"], in_features: int, group_size: int
) -> Float[Array, "*batch m"]:
    """Return a parameter of every group, repeated for each of the group's columns, `[..., in_features]`."""
    repeated = jnp.broadcast_to(parameter[..., None], (*parameter.shape, group_size))
    return repeated.reshape(*parameter.shape[:-1], -1)[..., :in_features]
