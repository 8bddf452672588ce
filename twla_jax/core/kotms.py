"""Fits Kronecker-structured orthogonal rotations that shape weights into three modes (KOTMS).

TWLA, arXiv 2606.13054, section 3.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float16

from twla_jax.core import stiefel
from twla_jax.core.arrays import AnyArray
from twla_jax.core.settings import RotationSettings

_DEFAULT = RotationSettings()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerRotation:
    """The rotation `x ↦ vec(L · mat(x) · R)` of `m = l·r` features; L and R orthogonal, `mat` is `l × r` row by row."""

    __no_type_check__: ClassVar[bool] = True  # a pytree may hold shardings or shapes in place of its arrays

    left: Float16[Array, "*batch l l"]
    right: Float16[Array, "*batch r r"]

    def __call__(self, x: Float[AnyArray, "*tokens m"]) -> Float[Array, "*tokens m"]:
        """Return x rotated, in its shape and dtype: `m·(l + r)` multiply-adds a token; weight rows rotate alike."""
        return rotate(x, self.left, self.right)


def rotate(
    x: Float[AnyArray, "*tokens m"], left: Float[AnyArray, "l l"], right: Float[AnyArray, "r r"]
) -> Float[Array, "*tokens m"]:
    """Return `vec(L · mat(x) · R)` in the shape and dtype of x; float32 stays true float32 on every chip."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    tiles = x.reshape(*x.shape[:-1], left.shape[-1], right.shape[-1])
    tiles = jnp.einsum("...ij,jb->...ib", tiles, right.astype(x.dtype), precision=precision)
    tiles = jnp.einsum("ai,...ib->...ab", left.astype(x.dtype), tiles, precision=precision)
    return tiles.reshape(x.shape)


def rotate_back(rows: Float[AnyArray, "*rows m"], rotation: KroneckerRotation) -> Float[Array, "*rows m"]:
    """Return `Ŵ Q`, the weights that give on x what `rows` give on the rotated `Q x`, in the dtype of `rows`.

    `w · vec(L mat(x) R) = vec(Lᵀ mat(w) Rᵀ) · x`, which also holds for factors that are orthogonal only to the
    precision in which they are stored.
    """
    return rotate(rows, rotation.left.T, rotation.right.T)


def rotate_moment(moment: Float[AnyArray, "m m"], rotation: KroneckerRotation) -> Float[Array, "m m"]:
    """Return the second moments of the rotated input, `Q S Qᵀ` `[m, m]`, from those of the input.

    S need not be symmetric.
    """
    left, right = rotation.left.astype(jnp.float32), rotation.right.astype(jnp.float32)
    return rotate(rotate(moment, left, right).T, left, right).T


def factor_sizes(in_features: int, out_features: int, rule: str) -> tuple[int, int]:
    """Return `(l, r)` with `l·r = in_features`.

    Args:
      in_features: features of the input that is rotated.
      out_features: outputs of all linears that read it.
      rule: 'balanced' takes the divisors nearest to the square root, l ≤ r; 'paper' takes for r the largest divisor
        of `in_features` not above `sqrt(out·in/64)`, the public code's budget, which gives 8×72 for a 576×576 layer.
    """
    bound = math.isqrt(in_features)
    if rule == "paper":
        bound = max(1, min(math.isqrt(out_features * in_features // 64), in_features))
    small = next(d for d in range(bound, 0, -1) if in_features % d == 0)
    if rule == "paper":
        return in_features // small, small
    return small, in_features // small


def tri_modal_loss(
    rows: Float[Array, "n m"], *, sigma: float = 0.25, balance: float = 0.1
) -> Float[Array, ""]:
    """Return a scalar: how far rows, less their mean, are from three equal Gaussians at −c, 0 and c.

    `c_i = mean|w_i|` and `σ_i = sigma·c_i` are not differentiated. Mean negative log-likelihood of an equal mixture,
    plus `balance·‖mean responsibilities − 1/3‖²` (TWLA's public code).
    """
    rows = rows - rows.mean(-1, keepdims=True)
    centre = jax.lax.stop_gradient(jnp.maximum(jnp.abs(rows).mean(-1, keepdims=True), 1e-12))
    # In units of c the modes are −1, 0, 1 with width sigma; the densities' common factor c is put back as log c. The
    # outer modes' exponents are taken relative to the middle one's.
    unit = rows / centre
    lower, upper = (-unit - 0.5) / sigma**2, (unit - 0.5) / sigma**2
    largest = jnp.maximum(jnp.maximum(lower, upper), 0)
    parts = [jnp.exp(exponent - largest) for exponent in (lower, jnp.zeros_like(unit), upper)]
    total = sum(parts)
    log_mixture = largest + jnp.log(total) - 0.5 * jnp.square(unit / sigma) - jnp.log(centre)
    responsibilities = jnp.stack([(part / total).mean() for part in parts])
    constant = math.log(3 * sigma * math.sqrt(2 * math.pi))
    return constant - log_mixture.mean() + balance * jnp.square(responsibilities - 1 / 3).sum()


def log_range(x: Float[Array, "c m"]) -> Float[Array, ""]:
    """Return the logarithm of the mean over tokens of `(max − min)² / mean x²`: a quantiser's noise, relative to x."""
    squares = jnp.square(x).mean(-1) + 1e-12
    return jnp.log((jnp.square(x.max(-1) - x.min(-1)) / squares).mean())


def stride(rows: int, wanted: int) -> int:
    """Return the distance of the rows that a fit looks at: at least `wanted` of all, 0 for every row."""
    return max(1, rows // wanted) if wanted else 1


@functools.partial(jax.jit, static_argnames=("settings", "sizes"))
def fit_rotation(
    weight: Float[Array, "n m"],
    key: jax.Array,
    sample: Float[Array, "c m"] | None = None,
    *,
    settings: RotationSettings = _DEFAULT,
    sizes: tuple[int, int] | None = None,
) -> tuple[KroneckerRotation, Float[Array, " 2"]]:
    """Fit the rotation shared by all rows of `weight` `[n, m]` (every linear that reads this input, stacked).

    Adam on the product of two Stiefel manifolds, `settings.steps` steps from a random orthogonal start or the identity.

    Args:
      weight: rows that `tri_modal_loss` shapes.
      key: of the random start.
      sample: tokens of the input, whose range counts with `settings.range_weight`; None looks at the weights alone.
      settings: of the loss and the optimiser; static. Its seed is not read.
      sizes: `(l, r)`; `factor_sizes` by `settings.factors` if not given. Static.
    Returns:
      The rotation with float16 factors, and the loss before and after, `[2]`.
    """
    sizes = sizes or factor_sizes(weight.shape[1], weight.shape[0], settings.factors)
    key_left, key_right = jax.random.split(key)
    if settings.start == "identity":
        start = (jnp.eye(sizes[0]), jnp.eye(sizes[1]))
    else:
        start = (
            stiefel.random_orthogonal(key_left, sizes[0]),
            stiefel.random_orthogonal(key_right, sizes[1]),
        )
    weight = weight[:: stride(len(weight), settings.rows)].astype(jnp.float32)
    optimizer = stiefel.riemannian(
        optax.adam(settings.learning_rate), stiefel.RETRACTIONS[settings.retraction]
    )

    def loss(factors):
        shape = tri_modal_loss(rotate(weight, *factors), sigma=settings.sigma, balance=settings.balance)
        if sample is None:
            return shape
        return shape + settings.range_weight * log_range(rotate(sample, *factors))

    def step(carry, _):
        factors, state = carry
        updates, state = optimizer.update(jax.grad(loss)(factors), state, factors)
        return (optax.apply_updates(factors, updates), state), None

    (factors, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=settings.steps)
    left, right = (factor.astype(jnp.float16) for factor in jax.tree.leaves(factors))
    return KroneckerRotation(left, right), jnp.stack([loss(start), loss(factors)])
