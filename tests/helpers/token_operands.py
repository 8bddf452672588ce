"""Makes operands that several ops share: rotated tokens, their order in threads, and attention in splits."""

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.core.kotms import KroneckerRotation
from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.rotate_quantize import (
    gpu_rotation,
    kernel_rotation,
)

from helpers import emulated_machine, emulated_threads


def rotated(token_smem, right_smem, left_smem, *, shape):
    """Return what a warpgroup's products leave in its threads: every `Zᵀ`, as `wgmma` has it in its registers."""
    for ref in (token_smem, right_smem, left_smem):
        emulated_machine.machine.read_by_all(ref)
    tokens, right, left = (
        emulated_machine.unswizzled(ref).astype(np.float32) for ref in (token_smem, right_smem, left_smem)
    )

    def pair(*values):
        return emulated_threads.pack_bfloat16(*map(emulated_threads.Real, values))

    thread = emulated_machine.machine.threads
    line, share = gpu_rotation.warpgroup_share(shape)
    row = share * (shape.rows // shape.shares) + thread % 4 * 2
    column = line * 64 + thread // 32 % 4 * 16 + thread % 32 // 4
    places = [(row + 8 * j, column + 8 * h) for j in range(shape.rows // shape.shares // 8) for h in (0, 1)]
    found = []
    for x in np.split(tokens, shape.tokens):
        y = (x @ right.T).astype(jnp.bfloat16).astype(np.float32)
        z = (left @ y).astype(jnp.bfloat16).astype(np.float32)
        found.append([pair(z[row, column], z[row + 1, column]) for row, column in places])
    return found


def in_splits(t, m, heads):
    """Return attention in four splits, one of no position; every order of additions gives the same mix."""
    mixed = jax.random.normal(jax.random.key(3), (t, 4, m), jnp.bfloat16).at[:, 2].set(0)
    top = jnp.array([3.0, 2.0, -1e30, 1.0])[:, None] + jnp.arange(heads)
    total = jnp.array([1.0, 1.0, 0.0, 2.0])[:, None] + jnp.zeros(heads)
    softmax = jnp.broadcast_to(jnp.stack([top, total], -1), (t, 4, heads, 2)).astype(jnp.float32)
    return AttentionSplits(mixed=mixed, softmax=softmax)


def permutation(rotation):
    rng = np.random.default_rng(0)
    factors = (np.eye(len(factor))[rng.permutation(len(factor))] for factor in rotation.factors)
    return kernel_rotation(KroneckerRotation(*map(jnp.asarray, factors)), jnp.bfloat16)
