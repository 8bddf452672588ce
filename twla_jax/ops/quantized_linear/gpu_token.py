"""A token's norm, rotation and codes on all threads of a block (Pallas Mosaic GPU), as fast as one can wait for them.

The rotation is two products on the tensor cores: `Yᵀ = Rᵀ Xᵀ`, of which a warpgroup has 64 rows, and from its
registers on `Zᵀ = Yᵀ Lᵀ`, of which warpgroups with the same rows take different columns.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.ops import gpu_threads as threads
from twla_jax.ops.gpu_threads import Real, Word
from twla_jax.ops.quantized_linear.gpu_products import Flat, write_table
from twla_jax.ops.rotate_quantize.gpu import swizzled
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.packing import TILE

_WGMMA_ROWS = 64
WHOLE = 1.5 * 2**23  # floats of this size are whole numbers


@dataclasses.dataclass(frozen=True)
class Shape:
    """A token as a `size × r` matrix, filled up to `rows × columns`, on so many warpgroups."""

    size: int
    r: int
    rows: int
    warpgroups: int

    @property
    def columns(self) -> int:
        """Of the filled up matrix."""
        return -(-self.r // _WGMMA_ROWS) * _WGMMA_ROWS

    @property
    def threads(self) -> int:
        """Of all warpgroups."""
        return 128 * self.warpgroups

    @property
    def lines(self) -> int:
        """Into how many of 64 rows `Yᵀ` is cut."""
        return self.columns // _WGMMA_ROWS

    @property
    def shares(self) -> int:
        """Into how many columns of `Zᵀ` are cut; warpgroups that are left do what another does, too."""
        most = self.warpgroups // self.lines
        return next(n for n in range(most, 0, -1) if self.rows % (8 * n) == 0)


def shape(rotation: KernelRotation, warpgroups: int) -> Shape:
    """How a rotation's tokens are shared between warpgroups."""
    r = len(rotation.right_transposed)
    return Shape(size=rotation.size, r=r, rows=len(rotation.left), warpgroups=warpgroups)


def obstacle(shape: Shape) -> str | None:
    """Why a token of such a shape cannot be turned, or None."""
    if shape.r % 8:
        return f"the right factor has {shape.r} rows, not a multiple of 8"
    if shape.lines > shape.warpgroups:
        return f"the right factor has {shape.r} rows, more than {_WGMMA_ROWS * shape.warpgroups}"
    # A thread's share of Yᵀ and Zᵀ, in registers.
    if shape.rows > 128:
        return f"the left factor has {shape.size} rows, more than 128"
    return None


def token_memory(shape: Shape, dtype):
    """Shared memory of the token."""
    return plgpu.SMEM((shape.rows, shape.columns), dtype, transforms=swizzled(shape.columns))


def left_memory(shape: Shape, dtype):
    """Shared memory of L."""
    return plgpu.SMEM((shape.rows, shape.rows), dtype, transforms=swizzled(shape.rows))


def right_memory(shape: Shape, dtype):
    """Shared memory of Rᵀ."""
    return plgpu.SMEM((shape.columns, shape.columns), dtype, transforms=swizzled(shape.columns))


def warps_memory(shape: Shape):
    """Shared memory of what warps tell each other: two numbers each."""
    return plgpu.SMEM((2 * shape.threads // threads.WARP,), jnp.float32)


def fetch(
    x_gmem, left_gmem, right_gmem, norm_gmem, settings_gmem, *, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Starts the way of a token, both factors and the norm's weights to the threads, for `load`; and the settings.

    Not by the copy engine, which would bring them in turn with the weights.
    """
    sources = [x_gmem, left_gmem, right_gmem, *([] if norm_gmem is None else [norm_gmem])]

    def plan():
        """Where to find how many words, of which array, and whether it has them."""
        pieces = zip(sources, [*_pieces(shape), _pieces(shape)[0]], strict=False)
        return [
            (k, matrix, i, ref.dtype.itemsize // 2)
            for k, (ref, of_ref) in enumerate(pieces)
            for matrix, i in of_ref
        ]

    count = sum(4 * width for *_, width in plan())

    @threads.on_threads(
        arg_types=(plgpu.RefType(),) * (len(sources) + 1),
        return_type=(threads.values(count, jnp.int32), threads.values(3, jnp.float32)),
    )
    def start(_, settings, *refs):
        found = [
            word
            for k, matrix, i, width in plan()
            for part in range(width)
            for word in threads.load_global(
                refs[k], matrix.offset(i) * width + 16 * part, 4, condition=matrix.real(i)
            )
        ]
        values = [threads.load_global(settings, threads.word(4 * i))[0].real() for i in range(3)]
        return threads.as_array(found), threads.as_array(values)

    return start(settings_gmem, *sources)


def load(
    words, token_smem, left_smem, right_smem, warps_smem, *, shape: Shape, epsilon: float | None
) -> None:
    """What `fetch` found into shared memory, the token after an RMS norm if ε is not None. Waits for the block."""
    matrices = [token_smem, left_smem, right_smem]

    @threads.on_threads(
        arg_types=(
            threads.per_thread(words.shape[0] // 128),
            *[plgpu.RefType(swizzled(ref.shape[1])) for ref in matrices],
            plgpu.RefType(),
        )
    )
    def copy(_, words, token, left, right, warps):
        found, fours = threads.words(words), []
        for pieces in _pieces(shape):
            fours.append([found[4 * i : 4 * i + 4] for i in range(len(pieces))])
            found = found[4 * len(pieces) :]
        if epsilon is not None:
            each = len(found) // len(fours[0])
            weights = [found[i : i + each] for i in range(0, len(found), each)]
            fours[0] = _normed(fours[0], weights, threads.address(warps), shape, epsilon)
        for ref, of_ref, pieces in zip((token, left, right), fours, _pieces(shape), strict=True):
            for four, (matrix, i) in zip(of_ref, pieces, strict=True):
                with threads.when(matrix.exists(i)):
                    threads.store(threads.address(ref) + matrix.place(i), *four)
        threads.publish()
        threads.barrier(shape.threads)

    copy(words, *matrices, warps_smem)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """Rows and columns of a bf16 matrix that is copied, 16 bytes a thread at once, and what it is filled up to."""

    rows: int
    columns: int
    whole_rows: int
    whole_columns: int

    def count(self, threads: int) -> int:
        return -(-self.whole_rows * self.whole_columns // (8 * threads))

    def _chunk(self, i: int) -> tuple[Word, Word]:
        index = threads.thread() + i
        chunks = self.whole_columns // 8
        return index // chunks, index % chunks

    def exists(self, i: int) -> ir.Value:
        return threads.thread() + i < self.whole_rows * self.whole_columns // 8

    def real(self, i: int) -> ir.Value:
        row, chunk = self._chunk(i)
        return threads.both(row < self.rows, chunk < self.columns // 8)

    def offset(self, i: int) -> Word:
        row, chunk = self._chunk(i)
        return (row * self.columns + chunk * 8) * 2

    def place(self, i: int) -> Word:
        """Where the swizzle has it."""
        width = next(size for size in (128, 64, 32) if 2 * self.whole_columns % size == 0)
        row, chunk = self._chunk(i)
        chunks = width // 16  # of a tile's row
        tile = (row // 8) * (self.whole_columns // 8 // chunks) + chunk // chunks
        turned = (chunk % chunks) ^ ((row // (128 // width)) % chunks)
        return tile * (8 * width) + (row % 8) * width + turned * 16


def _pieces(shape: Shape) -> list[list[tuple[_Matrix, int]]]:
    """What a thread copies of the token, of L and of Rᵀ: pieces by the index that its first thread has."""
    matrices = (
        _Matrix(shape.size, shape.r, shape.rows, shape.columns),
        _Matrix(shape.rows, shape.rows, shape.rows, shape.rows),
        _Matrix(shape.r, shape.r, shape.columns, shape.columns),
    )
    return [[(matrix, i * shape.threads) for i in range(matrix.count(shape.threads))] for matrix in matrices]


def _normed(
    fours: list[list[Word]], scales: list[list[Word]], warps: Word, shape: Shape, epsilon: float
) -> list[list[Word]]:
    values, weights = ([threads.eight_reals(each) for each in part] for part in (fours, scales))
    total = threads.real(0.0)
    for value in (value for piece in values for value in piece):
        total = value.times_plus(value, total)
    for distance in (1, 2, 4, 8, 16):
        total = total + threads.shuffle(total, distance)
    me = threads.thread()
    with threads.when((me & (threads.WARP - 1)).equals(0)):
        threads.store(warps + (me // threads.WARP) * 4, total)
    threads.barrier(shape.threads)
    sums = [each.real() for i in range(shape.warpgroups) for each in threads.load(warps, 4, offset=16 * i)]
    mean = _tree(sums, Real.__add__) * (1 / (shape.size * shape.r))
    factor = threads.reciprocal_root(mean + epsilon)
    normed = [
        [value * factor * weight for value, weight in zip(*piece, strict=True)]
        for piece in zip(values, weights, strict=True)
    ]
    return [[threads.pack_bfloat16(*piece[i : i + 2]) for i in range(0, len(piece), 2)] for piece in normed]


def turn(token_smem, right_smem, left_smem, *, shape: Shape) -> jax.Array:
    """This warpgroup's part of `Zᵀ`, float32 that were rounded to bf16; token_smem is free when all have come here."""
    line, share = _place(shape)
    columns = shape.rows // shape.shares

    def product(a, b, n: int):
        def run(acc_ref):
            plgpu.wgmma(acc_ref, a, b)
            return acc_ref[...].astype(jnp.bfloat16)

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((_WGMMA_ROWS, n), jnp.float32))

    lines = right_smem.at[pl.ds(line * _WGMMA_ROWS, _WGMMA_ROWS)]
    y = product(lines, token_smem.T, shape.rows)
    z = product(y, left_smem.at[pl.ds(share * columns, columns)].T, columns)
    return z.astype(jnp.float32)


def _place(shape: Shape):
    group = lax.axis_index("warpgroup")
    return lax.rem(group, shape.lines), lax.rem(lax.div(group, shape.lines), shape.shares)


def quantize(z, settings, codes_smem, table_smem, warps_smem, *, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of the token, whose codes and sums go to shared memory. Waits for the block."""
    line, share = _place(shape)
    flat = Flat(shape.r)
    splat = plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT)
    layout = plgpu.Layout.WGMMA

    @threads.on_threads(
        arg_types=(layout, *[plgpu.Layout.WG_SPLAT] * 2, threads.per_thread(3), *[plgpu.RefType()] * 3),
        return_type=(splat, splat),
    )
    def write(_, z, line, share, settings, codes, table, warps):
        elements = _elements(z, threads.splat_word(line), threads.splat_word(share), shape)
        ends = []
        for worst, choose, over_warp in (
            (float("inf"), Real.least, threads.warp_least),
            (float("-inf"), Real.most, threads.warp_most),
        ):
            values = [
                each.value
                if each.real is None
                else threads.select(each.real, each.value, threads.real(worst))
                for each in elements
            ]
            ends.append(over_warp(_tree(values, choose)))
        me, at = threads.thread(), threads.address(warps)
        with threads.when((me & (threads.WARP - 1)).equals(0)):
            threads.store(at + (me // threads.WARP) * 8, *ends)
        levels, clip, half = threads.reals(settings)
        threads.barrier(shape.threads)
        # Not before: codes may take the place of the token, which other warpgroups turn until they come here.
        _write_zeros(threads.address(codes), table, shape, flat)
        both = [
            each.real() for i in range(2 * shape.warpgroups) for each in threads.load(at, 4, offset=16 * i)
        ]
        low, high = clip * _tree(both[::2], Real.least), clip * _tree(both[1::2], Real.most)
        scale = ((high - low) / levels).most(1e-8)
        zero_point = threads.nearest(threads.real(0.0) - low / scale)
        inverse, origin, last = threads.real(1.0) / scale, zero_point - WHOLE, threads.real(WHOLE) - half
        for each in elements:
            # Among numbers as large as WHOLE, sums are rounded to whole ones, whose lowest byte is the code's.
            code = (each.value.times_plus(inverse, WHOLE) + origin).most(0.0).least(levels) + last
            place = threads.address(codes) + each.place
            threads.store_byte(place, code.word(), offset=each.offset, condition=each.real)
        threads.barrier(shape.threads)
        write_table(threads.address(codes), table, flat, shape.threads)
        threads.barrier(shape.threads)
        return threads.as_splat(scale), threads.as_splat(zero_point - half)

    return write(z, line, share, settings, codes_smem, table_smem, warps_smem)


@dataclasses.dataclass(frozen=True)
class _Element:
    """A number of `Z`, where its code's byte goes, and whether it is the token's; None where it is known to be."""

    value: Real
    place: Word
    offset: int
    real: ir.Value | None


def _elements(z, line: Word, share: Word, shape: Shape) -> list[_Element]:
    """A thread's numbers of its warpgroup's part of `Zᵀ`."""
    flat, width = Flat(shape.r), shape.rows // shape.shares
    lane, warp = threads.thread() & (threads.WARP - 1), (threads.thread() // threads.WARP) & 3
    first_column, first_row = line * _WGMMA_ROWS + warp * 16 + lane // 4, share * width + (lane & 3) * 2
    regular = shape.r % flat.run == 0  # then one row begins where another does, so much further
    start = flat.place(first_row * shape.r + first_column)
    out = []
    # Pairs of rows next to each other, one in a column and one eight columns on.
    for i, value in enumerate(threads.reals(z)):
        row, column = i // 4 * 8 + i % 2, i // 2 % 2 * 8
        if regular:
            place, offset = start, row * flat.size(shape.r) + column
        else:
            place, offset = flat.place((first_row + row) * shape.r + first_column + column), 0
        last = (shape.shares - 1) * width + i // 4 * 8 + 7
        real = None
        if last >= shape.size or shape.columns != shape.r:
            real = threads.both(first_row + row < shape.size, first_column + column < shape.r)
        out.append(_Element(value, place, offset, real))
    return out


def _write_zeros(codes: Word, table: ir.Value, shape: Shape, flat: Flat) -> None:
    """Codes past a token's last, up to the end of a tile."""
    last = (threads.shape(table)[0] - 1) * TILE
    count = last - shape.size * shape.r
    me = threads.thread()
    for i in range(-(-count // (4 * shape.threads))):
        index = (me + i * shape.threads) * 4
        with threads.when(index < count):
            threads.store(codes + flat.place(index + shape.size * shape.r), threads.word(0))


def _tree(values: list, combine):
    """All values combined, two by two, so that none waits long for another."""
    while len(values) > 1:
        values = [
            combine(*values[i : i + 2]) if i + 1 < len(values) else values[i]
            for i in range(0, len(values), 2)
        ]
    return values[0]
