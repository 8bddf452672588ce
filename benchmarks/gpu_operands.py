"""Makes random operands of the kernels, for the checks on a GPU."""

import jax
import jax.numpy as jnp

from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.packing import TILE
from twla_jax.core.tensors import IntegerTensor
from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.rotate_quantize import kernel_rotation, quantizer_settings
from twla_jax.ops.ternary_matmul import KernelWeight
from twla_jax.ops.ternary_matmul.weight import pair
from twla_jax.ops.tokens import QuantizedTokens, group_sums

TOKENS = 8


def random_weight(
    key: jax.Array, n: int, m: int, *, exact: bool = False, grouped: bool = True
) -> KernelWeight:
    """Return a matrix with an (α, μ) for every 128 columns, up to 63 steps each, or for a row if not `grouped`.

    `exact` makes both 1, and the product a sum of integers.
    """
    keys = jax.random.split(key, 3)
    tiles = -(-m // TILE)
    unsigned = jax.random.randint(keys[0], (tiles, n, TILE // 4, 4), 0, 3, jnp.uint8)
    if grouped:
        alpha, mu = (
            jnp.ones((2, tiles, 4, n), int)
            if exact
            else jax.random.randint(keys[1], (2, tiles, 4, n), -63, 64)
        )
        scales = pair(alpha, mu - alpha)  # of stored codes, T + 1
    else:
        scales = jnp.ones((1, 2, n)) if exact else jax.random.randint(keys[1], (1, 2, n), -63, 64) / 64
        scales = scales.astype(jnp.float16)
    return KernelWeight(
        codes=(unsigned << jnp.array([0, 2, 4, 6], jnp.uint8)).sum(-1, dtype=jnp.uint8),
        scales=scales,
        row_sums=jax.random.normal(keys[2], (n,)),
        steps=jnp.full(n, 1 / 64 if grouped and not exact else 1.0),
        bias=jnp.zeros(n),
        in_features=m,
        splits=(n,),
    )


def random_tokens(key: jax.Array, t: int, m: int, *, exact: bool = False) -> QuantizedTokens:
    """Return 8-bit codes; `exact` leaves scale and zero point out."""
    codes = jax.random.randint(key, (t, m), -128, 128, jnp.int8)
    scale = jnp.ones(t) if exact else jax.random.uniform(key, (t,))
    zero_point = jnp.zeros(t) if exact else jax.random.normal(key, (t,))
    return QuantizedTokens(codes=codes, scale=scale, zero_point=zero_point, sums=group_sums(codes))


def random_integers(
    key: jax.Array, n: int, m: int, bits: int, size: int, *, exact: bool = False
) -> IntegerTensor:
    """Return random codes, scales and zero points by groups of this size; `exact` makes the scales 1."""
    keys = jax.random.split(key, 3)
    groups = (n, -(-m // size))
    scale = jnp.ones(groups) if exact else jax.random.uniform(keys[0], groups, minval=0.5, maxval=1.5)
    return IntegerTensor(
        codes=jax.random.randint(keys[1], (n, m), 0, 2**bits, jnp.int32).astype(jnp.uint8),
        scale=scale.astype(jnp.float16),
        zero_point=jax.random.randint(keys[2], groups, 0, 2**bits, jnp.int32).astype(jnp.uint8),
        in_features=m,
        group_size=size,
        bits=bits,
    )


def random_splits(t: int, m: int, heads: int) -> AttentionSplits:
    """Return attention over four parts of the positions."""
    keys = jax.random.split(jax.random.key(7), 3)
    softmax = [jax.random.uniform(key, (t, 4, heads), minval=0.5, maxval=4) for key in keys[:2]]
    mixed = jax.random.normal(keys[2], (t, 4, m), jnp.bfloat16)
    return AttentionSplits(mixed=mixed, softmax=jnp.stack(softmax, -1))


def random_input(t: int, left: int, right: int, *, gated: bool = False):
    """Return operands of `rotate_quantize` at 8 bits; twice as wide if gated."""
    keys = jax.random.split(jax.random.key(1), 3)
    factors = (
        jnp.linalg.qr(jax.random.normal(key, (size, size)))[0]
        for key, size in zip(keys, (left, right), strict=False)
    )
    rotation = kernel_rotation(KroneckerRotation(*factors), jnp.bfloat16)
    width = left * right * (2 if gated else 1)
    x = (jax.random.normal(keys[2], (t, width)) + 0.3).astype(jnp.bfloat16)
    return x, rotation, quantizer_settings(8, 0.9)


def largest(values: jax.Array) -> float:
    """Return the largest magnitude."""
    return float(jnp.abs(values).max())
