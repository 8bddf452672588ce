"""What both kernels have in common: tokens as matrices, and sums of codes finer than groups."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Int32

from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.tokens import QuantizedTokens
from twla_jax.packing import PLANE


def as_matrices(x: Float[Array, "t m"], rotation: KernelRotation) -> Float[Array, "t rows r"]:
    """Each token as `mat(x)`, with rows of zeros up to those of the filled up L."""
    rows, r = len(rotation.left), len(rotation.right_transposed)
    return jnp.pad(x, ((0, 0), (0, rows * r - x.shape[1]))).reshape(len(x), rows, r)


def parts(x: Float[Array, "t width"], rotation: KernelRotation) -> Float[Array, "t parts l r"]:
    """Each token as `mat(x)`, or as its two matrices where a gate stands before what it gates; nothing is copied."""
    return x.reshape(len(x), -1, rotation.size, len(rotation.right_transposed))


def chunk(r: int) -> int:
    """The columns of `mat(x)` that one sum of codes goes over: a group of 128 begins and ends between such chunks."""
    return math.gcd(r, PLANE)


def collect(
    codes: Int8[Array, "t l r"],
    scale: Float32[Array, " t"],
    zero_point: Float32[Array, " t"],
    sums: Int32[Array, "t l chunks"],
) -> QuantizedTokens:
    """The kernels' outputs, without what was filled up, as flat tokens with a sum for every group of 128."""
    t, _, r = codes.shape
    # Groups are whole numbers of chunks; the last one may lack some.
    flat = sums.reshape(t, -1)
    per_group = PLANE // chunk(r)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % per_group)))
    groups = flat.reshape(t, -1, per_group).sum(-1)
    groups = jnp.pad(groups, ((0, 0), (0, -groups.shape[1] % 4)))
    return QuantizedTokens(codes=codes.reshape(t, -1), scale=scale, zero_point=zero_point, sums=groups)
