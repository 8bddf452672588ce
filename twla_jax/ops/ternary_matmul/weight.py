"""Converts ternary weights to the layout the kernels read, once, when a model is loaded."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Int16, Int32, UInt8

from twla_jax.core import packing
from twla_jax.core.tensors import TernaryTensor, row_steps
from twla_jax.errors import TwlaError
from twla_jax.ops.ternary_matmul.tile_configs import ROW_PADDING


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """Holds what the weight-only kernels read: codes of `bits` bits, planar in tiles, and scales.

    Byte c of a tile holds columns c, c + 128, …, lowest bits first: one of each of the tile's `planes`. Rows of a tile
    lie together, as the kernels load several at a time. A stored code is `offset` above the one it stands for, C.
    Where `relative`, a weight is `α·(C + μ)`, elsewhere `α·C + μ`.

    `scales` are α and μ in float16, or, for TPUs, int16 of the same bits: see `scale_bits`. Where `paired`, both are
    whole numbers of a row's steps, each a signed byte of an int16: see `pair`.
    """

    codes: UInt8[Array, "tiles rows 128"]
    scales: Float16[Array, "tiles parameters rows"] | Int16[Array, "tiles parameters rows"]
    in_features: int = dataclasses.field(metadata={"static": True})

    @property
    def bits(self) -> int:
        """Return the bits of a code."""
        raise NotImplementedError

    @property
    def offset(self) -> int:
        """Return what is added to a code to store it."""
        raise NotImplementedError

    @property
    def relative(self) -> bool:
        """Return whether μ counts in steps of α."""
        raise NotImplementedError

    @property
    def paired(self) -> bool:
        """Return whether α and μ are bytes, not float16."""
        raise NotImplementedError

    @property
    def planes(self) -> int:
        """Return the number of codes in a byte."""
        return 8 // self.bits

    @property
    def column_tiles(self) -> int:
        """Return the number of tiles of `128·planes` columns."""
        return self.codes.shape[0]

    @property
    def rows(self) -> int:
        """Return the number of rows, padding included."""
        return self.codes.shape[1]

    @property
    def gpu_scales(self) -> Float16[Array, "tiles parameters rows"] | Int16[Array, "tiles parameters rows"]:
        """Return the scales as GPU kernels take them."""
        return self.scales if self.paired else as_type(self.scales, jnp.float16)

    @property
    def scale_bits(self) -> Int16[Array, "tiles parameters rows"]:
        """Return the scales as TPU kernels take them, which XLA makes of float16 ones by another copy."""
        return as_type(self.scales, jnp.int16)

    @property
    def grouped(self) -> bool:
        """Return whether there is an (α, μ) for every 128 columns, not one a row."""
        return self.paired or self.parameters == 2 * self.planes

    @property
    def parameters(self) -> int:
        """Return the scales of a row in a tile: one for every plane, or two."""
        return self.scales.shape[1]

    def of_planes(
        self, scales: Float16[Array, "parameters rows"] | Int16[Array, "parameters rows"]
    ) -> Float32[Array, "2 planes rows"]:
        """Return α and μ of a tile's planes, or of rows that have one pair (`planes` is 1), in steps where `paired`."""
        if self.paired:
            return jnp.stack(fields_of_pair(scales.astype(jnp.int32))).astype(jnp.float32)
        return as_type(scales, jnp.float16).astype(jnp.float32).reshape(2, -1, scales.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelWeight(PackedWeight):
    """Holds one ternary matrix, or several that read the same input one below the other.

    Invariants: a tile of `codes` is 512 columns as `packing.pack` makes them, the last one padded with zeros.
    `row_sums[r] = Σ_k Ŵ[r, k]`. What lies past the first `sum(splits)` rows and past `in_features` columns is zero.

    Where there are several groups, α and μ of a row are whole numbers of its `steps`, as the quantisers round them,
    such that every weight is −127 to 127 of them, and integers add up across groups. `scales[t, i]` is the pair of
    plane i of tile t, which are 128 columns of one group; its μ belongs to codes as they are stored, `U = T + 1`, and
    so is the weight of T = −1. Where a row is a single group, `scales` is `[1, 2, rows]`, its α and μ, and a step is 1.
    """

    row_sums: Float32[Array, " rows"]
    steps: Float32[Array, " rows"]
    bias: Float32[Array, " rows"]
    splits: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def bits(self) -> int:
        """Return the bits of a stored code: 2."""
        return 2

    @property
    def offset(self) -> int:
        """Return 1, as `U = T + 1` is stored; or 0 where pairs are, which belong to U."""
        return 0 if self.paired else 1

    @property
    def relative(self) -> bool:
        """Return False: μ is not a number of αs."""
        return False

    @property
    def paired(self) -> bool:
        """Return whether there are several groups."""
        return self.parameters == self.planes

    @property
    def out_features(self) -> int:
        """Return the number of rows that are outputs."""
        return sum(self.splits)

    def finished(
        self, y: Float[Array, "t rows"], residual: Float[Array, "t n"] | None
    ) -> Float[Array, "t n"]:
        """Return the outputs `[t, n]`: y without its padding rows, plus the residual."""
        y = y[:, : self.out_features]
        return y if residual is None else residual + y


def shapes_of_one[W: PackedWeight](weight: W) -> W:
    """Return the shapes of one matrix of several, whose arrays have a leading axis."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), weight)


def as_type(scales: jax.Array, dtype) -> jax.Array:
    """Return the same bits as float16 or int16."""
    return scales if scales.dtype == dtype else jax.lax.bitcast_convert_type(scales, dtype)


def pair(alpha: Int32[Array, "*shape"], mu: Int32[Array, "*shape"]) -> Int16[Array, "*shape"]:
    """Return both, from −128 to 127, in the upper and the lower byte."""
    return ((alpha << 8) | (mu & 0xFF)).astype(jnp.int16)


def fields_of_pair(pair: Int32[Array, "*shape"]) -> tuple[Int32[Array, "*shape"], Int32[Array, "*shape"]]:
    """Return α and μ of an int16 that is held in 32 bits."""
    return pair >> 8, (pair << 24) >> 24


def kernel_weight(
    weights: Sequence[TernaryTensor], biases: Sequence[Array | None] | None = None
) -> KernelWeight:
    """Return the matrices, which read the same input, stacked into one in the layout of the kernels.

    Where there are several groups, α and μ are rounded to whole steps; those that the quantisers make already are.

    Args:
      weights: without leading axes, of the same columns and group size: a multiple of 128, or one group a row.
      biases: of their outputs; None for no bias.

    Raises:
      TwlaError: the group size is one that the kernels cannot store.
    """
    m, size = weights[0].in_features, weights[0].group_size
    single = size >= m
    if not single and size % packing.PLANE:
        raise TwlaError(f"group size {size}: kernels take a multiple of {packing.PLANE}, or one group a row")
    rows = sum(weight.shape[0] for weight in weights)
    padding = -rows % ROW_PADDING
    parts = zip(*((weight.codes, weight.alpha, weight.offsets()) for weight in weights), strict=True)
    codes, alpha, mu = (jnp.concatenate([jnp.asarray(each) for each in part]) for part in parts)
    bias = jnp.concatenate(
        [
            jnp.zeros(weight.shape[0]) if bias is None else jnp.asarray(bias, jnp.float32)
            for weight, bias in zip(weights, biases or [None] * len(weights), strict=True)
        ]
    )
    whole = _whole_tiles(codes, m)
    tiles = whole.shape[1] // packing.PLANE
    whole = jnp.pad(whole, ((0, padding), (0, 0))).reshape(-1, tiles, packing.PLANE)
    if single:
        steps = jnp.ones(rows)
        scales = jnp.stack([alpha[:, 0], mu[:, 0]])[None]
    else:
        steps = row_steps(alpha, mu)
        alpha, mu = (jnp.round(each / steps[:, None]).astype(jnp.int32) for each in (alpha, mu))
        scales = _by_plane(pair(alpha, mu - alpha), size // packing.PLANE, tiles)
    return KernelWeight(
        codes=whole.swapaxes(0, 1),
        scales=jnp.pad(scales, ((0, 0), (0, 0), (0, padding))),
        row_sums=jnp.pad(steps * _row_sums(codes, alpha, mu, m, size), (0, padding)),
        steps=jnp.pad(steps, (0, padding), constant_values=1.0),
        bias=jnp.pad(bias, (0, padding)),
        in_features=m,
        splits=tuple(weight.shape[0] for weight in weights),
    )


def _whole_tiles(codes: jax.Array, m: int) -> jax.Array:
    """Return the codes with the last tile, which `packing.pack` cut short, padded with zeros."""
    full = m // packing.TILE * packing.PLANE
    if not (rest := m % packing.TILE):
        return codes
    tail = packing.unpack(codes[:, full:], rest)
    tail = jnp.pad(tail, ((0, 0), (0, packing.TILE - rest)))
    # `pack` takes T and stores T + 1; padding columns are stored as 0, as padding rows are.
    return jnp.concatenate([codes[:, :full], packing.pack(tail.astype(jnp.int8) - 1)], axis=1)


def _by_plane(parameter: jax.Array, repeats: int, tiles: int) -> jax.Array:
    """Return `[rows, groups]` as `[tiles, 4, rows]`."""
    each = jnp.repeat(parameter, repeats, axis=1)[:, : 4 * tiles]
    each = jnp.pad(each, ((0, 0), (0, 4 * tiles - each.shape[1])))
    return each.T.reshape(tiles, 4, -1)


def _row_sums(codes: jax.Array, alpha: jax.Array, mu: jax.Array, m: int, size: int) -> jax.Array:
    padding = -m % size
    ternary = packing.unpack(codes, m).astype(jnp.int8) - 1
    ternary = jnp.pad(ternary, ((0, 0), (0, padding))).reshape(len(codes), -1, size)
    counts = jnp.full(ternary.shape[1], size).at[-1].add(-padding)
    sums = ternary.sum(-1, dtype=jnp.int32).astype(jnp.float32)
    return (alpha.astype(jnp.float32) * sums + mu.astype(jnp.float32) * counts).sum(-1)
