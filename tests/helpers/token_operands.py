"""Makes operands that several ops share: rotated tokens, their order in threads, and attention in splits."""

import functools

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


def random_key():
    """Return a key of the generator whose programs compile in a fraction of the default one's time."""
    return jax.random.key(0, impl="unsafe_rbg")


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


# One program for each shape; its operations would each be compiled.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def in_splits(t, m, heads):
    """Return attention in four splits, one of no position; every order of additions gives the same mix."""
    mixed = jax.random.normal(jax.random.key(3), (t, 4, m), jnp.bfloat16).at[:, 2].set(0)
    top = jnp.array([3.0, 2.0, -1e30, 1.0])[:, None] + jnp.arange(heads)
    total = jnp.array([1.0, 1.0, 0.0, 2.0])[:, None] + jnp.zeros(heads)
    softmax = jnp.broadcast_to(jnp.stack([top, total], -1), (t, 4, heads, 2)).astype(jnp.float32)
    return AttentionSplits(mixed=mixed, softmax=softmax)


def permutation(rotation):
    rng = np.random.default_rng(0)
    sizes = rotation.size, len(rotation.right_transposed)
    factors = (np.eye(size, dtype=np.float16)[rng.permutation(size)] for size in sizes)
    return _laid_out(KroneckerRotation(*factors), jnp.bfloat16)


_laid_out = jax.jit(kernel_rotation, static_argnums=1)
