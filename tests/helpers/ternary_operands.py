"""Makes random ternary matrices and tokens, and the shapes of both."""

import jax
import jax.numpy as jnp
import numpy as np

from twla_jax.core import tensors
from twla_jax.ops.ternary_matmul import kernel_weight
from twla_jax.ops.tokens import QuantizedTokens, group_sums

packed = jax.jit(kernel_weight)  # one program; its operations would each be compiled for every shape


def matrix(n, m, size, *, alpha=None, mu=None, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, -(-m // size))
    codes = jnp.asarray(rng.integers(-1, 2, (n, m)), jnp.int8)
    alpha = jnp.asarray(rng.normal(size=shape) if alpha is None else np.full(shape, alpha))
    mu = jnp.asarray(rng.normal(size=shape) * 0.1 if mu is None else np.full(shape, mu))
    return tensors.from_codes(codes, *in_whole_steps(alpha, mu, size), size)


in_whole_steps = jax.jit(tensors.in_whole_steps, static_argnums=2)


def tokens(t, m, seed=0):
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(-128, 128, (t, m)), jnp.int8)
    return QuantizedTokens(
        codes=codes,
        scale=jnp.asarray(rng.random(t), jnp.float32),
        zero_point=jnp.asarray(rng.integers(-99, 99, t), jnp.float32),
        sums=group_sums(codes),
    )


def operands(x):
    if isinstance(x, QuantizedTokens):
        return x.codes, x.sums, x.scale, x.zero_point
    return x, group_sums(x), jnp.ones(len(x)), jnp.zeros(len(x))


def matrix_of_shape(n, m, size):
    groups = -(-m // size)
    return tensors.from_codes(
        jnp.zeros((n, m), jnp.int8), jnp.zeros((n, groups)), jnp.zeros((n, groups)), size
    )


def operand_shapes(t, n, m, size, dtype):
    x = jnp.zeros((t, m), dtype)
    return jax.eval_shape(lambda: (*operands(x), kernel_weight([matrix_of_shape(n, m, size)])))
