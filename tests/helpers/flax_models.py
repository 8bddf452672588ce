"""Small Flax models that know nothing of the library, inputs for them, and rounding to nearest as a baseline."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class LinenAttentionLike(nn.Module):
    """One linear, one with two output axes, one that sums over two axes, and a head that no rule matches."""

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(32, name="up")(x))
        h = nn.DenseGeneral((4, 8), name="heads")(nn.LayerNorm()(h))
        h = nn.DenseGeneral(32, axis=(-2, -1), use_bias=False, name="down")(h)
        return nn.Dense(5, name="head")(h)


class NnxAttentionLike(nnx.Module):
    """The same in NNX, with einsums; one of them puts the kernel's axis before the input's."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs)])
        self.heads = nnx.Einsum("...d,dhk->...hk", (32, 4, 8), (4, 8), rngs=rngs)
        self.down = nnx.Einsum("bhk,hkd->db", (4, 8, 32), rngs=rngs)
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.gelu(layer(x))
        return self.head(self.down(self.heads(x)).T)


def correlated_inputs(seed: int, count: int = 96, features: int = 32) -> jax.Array:
    """Inputs `[count, features]` of a decaying spectrum, the same one for all seeds."""
    basis = np.random.default_rng(7).normal(size=(features, features)) * 0.8 ** np.arange(features)[:, None]
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, features)) @ basis, jnp.float32)


def nearest_ternary(kernel: np.ndarray, contracted: tuple[int, ...], group: int) -> np.ndarray:
    """The kernel rounded to `μ + α·{−1, 0, 1}`: μ the mean of a group of inputs, α the mean distance from it."""
    free = [axis for axis in range(kernel.ndim) if axis not in contracted]
    order = [*free, *contracted]
    moved = np.asarray(kernel, np.float64).transpose(order)
    groups = moved.reshape(-1, group)
    mu = groups.mean(1, keepdims=True)
    alpha = np.abs(groups - mu).mean(1, keepdims=True)
    rounded = mu + alpha * np.clip(np.round((groups - mu) / alpha), -1, 1)
    return rounded.reshape(moved.shape).transpose(np.argsort(order))


def relative_error(outputs, exact) -> float:
    """`‖y − y₀‖² / ‖y₀‖²`."""
    exact = np.asarray(exact, np.float64)
    return float(np.square(np.asarray(outputs, np.float64) - exact).sum() / np.square(exact).sum())
