"""Computes the ternary matmul in plain XLA: it runs everywhere, and kernels are tested against it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num

from twla_jax.core import packing
from twla_jax.ops.ternary_matmul.weight import KernelWeight, PackedWeight


def matmul(
    x: Num[Array, "t m"],
    sums: Num[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    residual: Float[Array, "t n"] | None = None,
    *,
    out_dtype,
) -> Float[Array, "t n"]:
    """Return `y = scale·(x Ŵᵀ − zero_point·w) + bias`, w being Ŵ's row sums, rounded, plus the residual.

    Args:
      x: int8 codes, or floats; float32 is multiplied in true float32.
      sums: `tokens.group_sums(x)`.
      scale: of each token.
      zero_point: of each token.
      weight: from `kernel_weight`.
      residual: in `out_dtype`.
      out_dtype: of the result.
    """
    y = product(x, sums, weight) * weight.steps
    y = scale[:, None] * (y - zero_point[:, None] * weight.row_sums) + weight.bias
    return weight.finished(y.astype(out_dtype), residual)


def in_two_parts(matmul: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return the product of wide tokens, whose finer codes come after the others: the sum of both parts' outputs."""

    def run(x, sums, scale, zero_point, weight: KernelWeight, residual=None, *, out_dtype) -> jax.Array:
        # Each part adds the bias.
        y = matmul(x, sums, scale, zero_point, weight, out_dtype=jnp.float32)
        y = y.reshape(2, -1, weight.out_features).sum(0) - weight.bias[: weight.out_features]
        return weight.finished(y.astype(out_dtype), residual)

    return run


def product(
    x: Num[Array, "t m"], sums: Num[Array, "t groups"], weight: PackedWeight
) -> Float32[Array, "t rows"]:
    """Return `x Ŵᵀ = Σ_g α_g·acc_g + μ_g·Q_g`, or `Σ_g α_g·(acc_g + μ_g·Q_g)`, with `acc_g = Σ_{k∈g} C_k·x_k`.

    Q_g are the `sums` of x over a group. Integers are accumulated in int32, floats in float32. A tile is unpacked at a
    time. For a `KernelWeight`, the result is in steps of its rows.
    """
    exact = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    planes = weight.planes
    groups = weight.column_tiles * planes
    shifts = weight.bits * jnp.arange(planes, dtype=jnp.uint8)[:, None]
    tokens = jnp.pad(x, ((0, 0), (0, groups * packing.PLANE - x.shape[1])))
    tokens = tokens.reshape(len(x), weight.column_tiles, planes, packing.PLANE).transpose(1, 2, 0, 3)
    totals = sums[:, :groups].reshape(len(x), weight.column_tiles, planes).transpose(1, 2, 0)

    def accumulate(tile, x_tile):
        codes = ((tile[:, None] >> shifts) & (2**weight.bits - 1)).astype(x.dtype) - weight.offset
        return jnp.einsum("gtk,ngk->gtn", x_tile, codes, precision=precision, preferred_element_type=exact)

    def grouped(y, operands):
        tile, x_tile, total, scales = operands
        acc, total = accumulate(tile, x_tile).astype(jnp.float32), total[..., None].astype(jnp.float32)
        alpha, mu = weight.of_planes(scales)[:, :, None]
        term = alpha * (acc + mu * total) if weight.relative else alpha * acc + mu * total
        return y + term.sum(0), None

    def single(acc, operands):
        return acc + accumulate(*operands).sum(0), None

    shape = len(x), weight.rows
    if weight.grouped:
        return jax.lax.scan(grouped, jnp.zeros(shape), (weight.codes, tokens, totals, weight.scales))[0]
    acc, _ = jax.lax.scan(single, jnp.zeros(shape, exact), (weight.codes, tokens))
    alpha, mu = weight.of_planes(weight.scales[0])
    return alpha * acc.astype(jnp.float32) + mu * sums.sum(-1, keepdims=True).astype(jnp.float32)
