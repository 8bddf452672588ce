"""The ternary matmul in plain XLA: runs everywhere, and what the kernels are held against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from twla_jax import packing
from twla_jax.ops.ternary_matmul.weight import KernelWeight


def matmul(
    x: Float[Array, "t m"],
    sums: Float[Array, "t groups"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    weight: KernelWeight,
    *,
    out_dtype,
) -> Float[Array, "t rows"]:
    """`y = scale·(Σ_g α_g·(acc_g − o·Q_g) + μ_g·Q_g − zero_point·w) + bias`, with `acc_g = Σ_{k∈g} U_k·x_k`.

    U are the stored codes and o their offset, Q_g the `sums` of x over a group and w the row sums of Ŵ. Integers are
    accumulated in int32, floats in float32. A tile is unpacked at a time.

    Args:
      x: int8 codes, or floats; float32 is multiplied in true float32.
      sums: `tokens.group_sums(x)`.
    Returns:
      `[t, rows]`, rows as stored, those past `weight.out_features` included.
    """
    exact = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    groups = weight.tiles * weight.planes
    bits = 8 // weight.planes
    shifts = bits * jnp.arange(weight.planes, dtype=jnp.uint8)[:, None]
    codes = weight.codes.reshape(-1, weight.tiles, packing.PLANE).swapaxes(0, 1)
    tokens = jnp.pad(x, ((0, 0), (0, groups * packing.PLANE - x.shape[1])))
    tokens = tokens.reshape(len(x), weight.tiles, weight.planes, packing.PLANE).transpose(1, 2, 0, 3)
    totals = sums[:, :groups].reshape(len(x), weight.tiles, weight.planes).transpose(1, 2, 0)

    def product(tile, x_tile):
        unsigned = ((tile[:, None] >> shifts) & (2**bits - 1)).astype(x.dtype)
        return jnp.einsum("gtk,ngk->gtn", x_tile, unsigned, precision=precision, preferred_element_type=exact)

    def grouped(y, operands):
        tile, x_tile, total, scales = operands
        centred = (product(tile, x_tile) - weight.offset * total[..., None]).astype(jnp.float32)
        alpha, mu = scales.astype(jnp.float32).reshape(2, weight.planes, 1, -1)
        return y + (alpha * centred + mu * total[..., None].astype(jnp.float32)).sum(0), None

    def single(acc, operands):
        tile, x_tile, total = operands
        return acc + (product(tile, x_tile) - weight.offset * total[..., None]).sum(0), None

    shape = (len(x), len(weight.codes))
    if weight.grouped:
        y, _ = jax.lax.scan(grouped, jnp.zeros(shape), (codes, tokens, totals, weight.scales))
    else:
        centred, _ = jax.lax.scan(single, jnp.zeros(shape, exact), (codes, tokens, totals))
        alpha, mu = weight.scales[0].astype(jnp.float32)
        y = alpha * centred.astype(jnp.float32) + mu * sums.sum(-1, keepdims=True).astype(jnp.float32)
    y = scale[:, None] * (y - zero_point[:, None] * weight.row_sums) + weight.bias
    return y.astype(out_dtype)
