"""Multiplies many tokens by packed weights on TPUs: rows are unpacked into VMEM, once for a block of tokens."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from twla_jax.core.packing import PLANE
from twla_jax.ops.ternary_matmul import tpu_few, tpu_unpack
from twla_jax.ops.ternary_matmul.weight import PackedWeight

CHUNK = 256  # tokens that are multiplied at once, for each 128 columns of the matrix unit


def kernel(
    x_ref, totals_ref, codes_ref, scales_ref, *refs, weight: PackedWeight, operand, chunk: int
) -> None:
    """Write the products of a block, its weights unpacked to `α·U + μ`, or to codes where rows are single groups.

    Args:
      x_ref: `[t, columns]`.
      totals_ref: `[1, t, 1]`, the sums of tokens; read where rows are single groups.
      codes_ref: `[tiles, rows, 128]`.
      scales_ref: `[tiles, parameters, rows]`.
      *refs: as in `tpu_few.kernel`, and last the memory for weights, `[rows, columns]`.
      weight: its shapes.
      operand: what the matrix unit multiplies.
      chunk: tokens that are multiplied at once, if those of a block are a multiple of them.
    """
    *affine_refs, out_ref, weights_ref = refs

    def unpack(k, _):
        packed = tpu_unpack.words(codes_ref[k])
        table = tpu_unpack.choices(scales_ref[k]) if weight.paired else None
        for plane in range(weight.planes):
            if table is None:
                unpacked = tpu_unpack.plane_codes(packed, plane, weight)
            else:
                unpacked = tpu_unpack.weights(packed, table, plane)
            columns = pl.ds(pl.multiple_of((weight.planes * k + plane) * PLANE, PLANE), PLANE)
            weights_ref[:, columns] = unpacked.astype(operand)

    lax.fori_loop(0, weight.column_tiles, unpack, None)
    tokens = out_ref.shape[0]
    chunk = math.gcd(tokens, chunk)

    def multiply(step, _):
        own = pl.ds(pl.multiple_of(step * chunk, chunk), chunk)
        y = lax.dot_general(
            x_ref[own, :].astype(operand),
            weights_ref[...],
            (((1,), (1,)), ((), ())),
            preferred_element_type=tpu_unpack.exact(operand),
        )
        if not weight.paired:
            alpha, mu = tpu_unpack.scales(scales_ref[0], weight)
            y = tpu_few.single_group(y, totals_ref[0, own, :], alpha, mu, weight)
        by_token, by_row = affine_refs[:2], affine_refs[2:]
        affine = [ref[own, :] for ref in by_token] + [ref[...] for ref in by_row]
        out_ref[own, :] = tpu_few.finished(y.astype(jnp.float32), *affine).astype(out_ref.dtype)

    lax.fori_loop(0, tokens // chunk, multiply, None)
