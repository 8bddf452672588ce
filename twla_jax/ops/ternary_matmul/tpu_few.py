"""Multiplies few tokens by packed weights on TPUs: all columns of some rows in one step, scales applied to sums."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from twla_jax.core.packing import PLANE
from twla_jax.ops.ternary_matmul import tpu_offsets, tpu_unpack
from twla_jax.ops.ternary_matmul.weight import PackedWeight

# Column tiles: the matrix unit takes long to answer, so it is asked for many before the first is read; and what is cut
# out at places that a loop computes takes longer to load.
_UNROLLED = 24


def kernel(
    x_ref, totals_ref, codes_ref, scales_ref, *refs, weight: PackedWeight, operand, together: int
) -> None:
    """Write the products of a block: the kernel's body.

    Args:
      x_ref: `[t, columns]`.
      totals_ref: `[tiles, t, planes]`, the sums of x over groups; of `tpu_offsets.totals` where scales are pairs; or
        `[1, t, 1]` where rows are single groups.
      codes_ref: `[tiles, rows, 128]`.
      scales_ref: `[tiles, parameters, rows]`.
      *refs: scale and zero point of tokens `[t, 1]`, row sums, biases and steps `[1, rows]`, or none of these; the
        output `[t, rows]`.
      weight: its shapes.
      operand: what the matrix unit multiplies.
      together: planes that are multiplied at once, 1 or 2: as wide as the matrix unit is.
    """
    *affine_refs, out_ref = refs
    exact = tpu_unpack.exact(operand)

    def products(k, planes) -> list[jax.Array]:
        packed = tpu_unpack.words(codes_ref[k])
        codes = [
            tpu_unpack.plane_codes(packed, plane, weight, in_place=weight.paired).astype(operand)
            for plane in range(planes)
        ]
        first = weight.planes * PLANE * k
        columns = [pl.ds(_aligned(first + PLANE * plane), PLANE) for plane in range(planes)]
        return _products([x_ref[:, own].astype(operand) for own in columns], codes, together, exact)

    def multiply(alphas_ref=None) -> None:
        def tile(k, y, planes=weight.planes):
            sums = products(k, planes)
            if alphas_ref is not None:
                for plane, acc in enumerate(sums):
                    y += alphas_ref[pl.ds(weight.planes * k + plane, 1), :] * acc.astype(jnp.float32)
                return y
            return (
                _relative(y, sums, totals_ref[k], scales_ref[k], weight) if weight.grouped else y + sum(sums)
            )

        if alphas_ref is None:
            y = jnp.zeros(out_ref.shape, jnp.float32 if weight.grouped else exact)
        else:
            alphas_ref[...] = tpu_offsets.alphas(scales_ref[...])
            y = tpu_offsets.offsets(totals_ref[0], scales_ref[...], operand)
        # Of the last tile, planes without columns are left out.
        whole, rest = divmod(-(-weight.in_features // PLANE), weight.planes)
        y = _over_tiles(whole, tile, y)
        y = tile(whole, y, rest) if rest else y
        if not weight.grouped:
            alpha, mu = tpu_unpack.scales(scales_ref[0], weight)
            y = single_group(y, totals_ref[0], alpha, mu, weight)
        out_ref[...] = finished(y, *(ref[...] for ref in affine_refs)).astype(out_ref.dtype)

    if weight.paired:
        # A row of it fills a register's rows as it is loaded, which takes the vector unit nothing.
        groups = weight.column_tiles * weight.planes
        pl.run_scoped(multiply, pltpu.VMEM((groups, out_ref.shape[-1]), jnp.float32))
    else:
        multiply()


def _relative(y, sums: list, totals, bits, weight: PackedWeight) -> jax.Array:
    """Return y with the sums of a tile's planes, in which μ counts in steps of α."""
    alpha, mu = tpu_unpack.scales(bits, weight)
    for plane, acc in enumerate(sums):
        own = slice(plane, plane + 1)
        total = totals[:, own].astype(jnp.float32)
        y += alpha[own] * (acc.astype(jnp.float32) + (mu[own] - tpu_unpack.code_offset(weight)) * total)
    return y


def single_group(acc, total, alpha, mu, weight: PackedWeight) -> jax.Array:
    """Return `α·Σ C·x + μ·Σ x` of rows that are single groups, from the sums of codes with their offset."""
    acc = (acc - tpu_unpack.code_offset(weight) * total).astype(jnp.float32)
    return alpha * acc + mu * total.astype(jnp.float32)


def finished(y, *affine) -> jax.Array:
    """Return `scale·(steps·y − zero_point·row_sums) + bias`, or y where these are not given."""
    if not affine:
        return y
    scale, zero_point, row_sums, bias, steps = affine
    return scale * (steps * y - zero_point * row_sums) + bias


def _products(xs: list, codes: list, together: int, exact) -> list[jax.Array]:
    """Return the product `[t, rows]` of each plane."""
    if together == 1:
        return [_product(x, each, exact) for x, each in zip(xs, codes, strict=True)]
    found = []
    for first in range(0, len(xs), 2):
        if first + 1 == len(xs):
            found.append(_product(xs[first], codes[first], exact))
            break
        a, b = xs[first : first + 2]
        # One pass for both: a's tokens meet zeros in b's columns, and the other way round.
        apart = jnp.concatenate(
            [jnp.concatenate([a, jnp.zeros_like(b)], 1), jnp.concatenate([jnp.zeros_like(a), b], 1)]
        )
        both = _product(apart, jnp.concatenate(codes[first : first + 2], axis=1), exact)
        found += [both[: len(a)], both[len(a) :]]
    return found


def _product(x, codes, exact) -> jax.Array:
    return lax.dot_general(x, codes, (((1,), (1,)), ((), ())), preferred_element_type=exact)


def _over_tiles(count: int, tile, y):
    whole = count // _UNROLLED

    def some(step, y):
        for k in range(_UNROLLED):
            y = tile(_UNROLLED * step + k, y)
        return y

    y = lax.fori_loop(0, whole, some, y) if whole > 1 else some(0, y) if whole else y
    for k in range(whole * _UNROLLED, count):
        y = tile(k, y)
    return y


def _aligned(column):
    return column if isinstance(column, int) else pl.multiple_of(column, PLANE)
