"""Converts integer weights to the layout the kernels read, once, when a model is loaded."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from twla_jax.core.packing import PLANE
from twla_jax.core.tensors import IntegerTensor
from twla_jax.errors import TwlaError
from twla_jax.ops.ternary_matmul.tile_configs import ROW_PADDING
from twla_jax.ops.ternary_matmul.weight import PackedWeight, as_type


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerWeight(PackedWeight):
    """Holds a matrix `Ŵ = α·(C + μ)` of codes of 4 or 8 bits, with an (α, μ) for every 128 columns of a row.

    Invariants: `codes` are those of the `IntegerTensor`, in tiles of two planes (4 bits) or one (8), and C is half of
    their range less: what int8 and bf16 hold exactly. μ is an integer, too, what C is at a weight of zero, negated.
    `scales[t, i]` and `scales[t, planes + i]` are α and μ of plane i of tile t. What lies past `out_features` rows and
    `in_features` columns is zero.
    """

    width: int = dataclasses.field(metadata={"static": True})
    out_features: int = dataclasses.field(metadata={"static": True})

    @property
    def bits(self) -> int:
        """Return the bits of a code: 4 or 8."""
        return self.width

    @property
    def offset(self) -> int:
        """Return half of the range of a code."""
        return 2 ** (self.width - 1)

    @property
    def paired(self) -> bool:
        """Return False: α is not a whole number of its row's steps."""
        return False

    @property
    def relative(self) -> bool:
        """Return True: a zero point is a number of steps."""
        return True


def obstacle(tensor: IntegerTensor) -> str | None:
    """Return why `integer_weight` cannot take a tensor, or None."""
    size = tensor.group_size
    if size >= tensor.in_features or size % PLANE == 0:
        return None
    return f"group size {size}: kernels take a multiple of {PLANE}, or one group a row"


def integer_weight(tensor: IntegerTensor) -> IntegerWeight:
    """Return the same matrix in the layout of the kernels: 4 bits a code where they suffice, else 8.

    Args:
      tensor: without leading axes; the group size a multiple of 128, or one group a row.

    Raises:
      TwlaError: the group size is one that the kernels have no place for.
    """
    if reason := obstacle(tensor):
        raise TwlaError(reason)
    n, m = tensor.shape
    width = 4 if tensor.bits <= 4 else 8
    planes = 8 // width
    tiles = -(-m // (planes * PLANE))
    groups, padding = tiles * planes, -n % ROW_PADDING
    codes = jnp.pad(jnp.asarray(tensor.codes), ((0, padding), (0, groups * PLANE - m)))
    codes = codes.reshape(-1, tiles, planes, PLANE)
    shifts = width * jnp.arange(planes, dtype=jnp.uint8)[:, None]
    repeats = -(-min(tensor.group_size, m) // PLANE)

    def by_plane(parameter):
        each = jnp.repeat(parameter, repeats, axis=1)[:, :groups]
        each = jnp.pad(each, ((0, padding), (0, groups - each.shape[1])))
        return each.T.reshape(tiles, planes, -1)

    mu = 2 ** (width - 1) - jnp.asarray(tensor.zero_point, jnp.float16)
    return IntegerWeight(
        codes=(codes << shifts).sum(2, dtype=jnp.uint8).swapaxes(0, 1),
        scales=jnp.concatenate([by_plane(jnp.asarray(tensor.scale)), by_plane(mu)], axis=1),
        in_features=m,
        width=width,
        out_features=n,
    )


def integer_rows(weight: IntegerWeight, rows: Int[Array, "*shape"], dtype) -> Float[Array, "*shape m"]:
    """Return some rows of `Ŵ` in `dtype`, as `tensors.take_rows` does; only these are unpacked."""
    values = _rows(weight, rows.reshape(-1))
    return values.reshape(*rows.shape, -1).astype(dtype)


def _rows(weight: IntegerWeight, rows: Int[Array, " t"]) -> Float[Array, "t m"]:
    # Rows of the first axis, because XLA on TPUs would otherwise copy the whole matrix into another layout; two rows
    # of scales, because it would copy these for a single one.
    places = jnp.arange(weight.column_tiles) * weight.rows + rows[:, None]
    packed = weight.codes.reshape(-1, PLANE).at[places].get(mode="promise_in_bounds")[:, :, None]
    two = jnp.pad(rows, (0, 1 if rows.size == 1 else 0))
    shifts = weight.bits * jnp.arange(weight.planes, dtype=jnp.uint8)[:, None]
    codes = ((packed >> shifts) & (2**weight.bits - 1)).astype(jnp.float32) - weight.offset
    scales = as_type(weight.scales[:, :, two], jnp.float16)[..., : rows.size]
    scales = scales.transpose(2, 0, 1).astype(jnp.float32)
    alpha, mu = scales[..., : weight.planes, None], scales[..., weight.planes :, None]
    return (alpha * (codes + mu)).reshape(len(rows), -1)[:, : weight.in_features]
