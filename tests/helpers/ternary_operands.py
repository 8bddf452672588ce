"""Makes random ternary matrices and tokens, and the shapes of both."""

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.core import tensors
from twla_jax.ops.ternary_matmul import kernel_weight
from twla_jax.ops.tokens import QuantizedTokens, group_sums

# One program each; their operations would each be compiled for every shape.
packed = jax.jit(kernel_weight)
in_whole_steps = jax.jit(tensors.in_whole_steps, static_argnums=2)
_from_codes = jax.jit(tensors.from_codes, static_argnums=3)
_group_sums = jax.jit(group_sums)


def matrix(n, m, size, *, alpha=None, mu=None, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, -(-m // size))
    codes = rng.integers(-1, 2, (n, m)).astype(np.int8)
    alpha = rng.normal(size=shape) if alpha is None else np.full(shape, alpha)
    mu = rng.normal(size=shape) * 0.1 if mu is None else np.full(shape, mu)
    return _from_codes(codes, *in_whole_steps(*(p.astype(np.float32) for p in (alpha, mu)), size), size)


def tokens(t, m, seed=0):
    rng = np.random.default_rng(seed)
    codes = jax.device_put(rng.integers(-128, 128, (t, m)).astype(np.int8))
    return QuantizedTokens(
        codes=codes,
        scale=jax.device_put(rng.random(t).astype(np.float32)),
        zero_point=jax.device_put(rng.integers(-99, 99, t).astype(np.float32)),
        sums=_group_sums(codes),
    )


def operands(x):
    if isinstance(x, QuantizedTokens):
        return x.codes, x.sums, x.scale, x.zero_point
    return x, _group_sums(x), np.ones(len(x), np.float32), np.zeros(len(x), np.float32)


def matrix_of_shape(n, m, size):
    groups = -(-m // size)
    return tensors.from_codes(
        jnp.zeros((n, m), jnp.int8), jnp.zeros((n, groups)), jnp.zeros((n, groups)), size
    )


def operand_shapes(t, n, m, size, dtype):
    x = jnp.zeros((t, m), dtype)
    return jax.eval_shape(lambda: (*operands(x), kernel_weight([matrix_of_shape(n, m, size)])))
