"""Splits heads up between threads, and rotates queries and keys to their positions, thread by thread (Mosaic GPU).

A thread holds the same few features of the queries, of a key and of a value; the threads of a position are neighbours.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from twla_jax.ops.decode_attention.split_sizes import SplitConfig
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Real, Word

BYTES = 16  # of an entry that a thread reads at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Describes features and heads, how they are split up, and whether entries are int8."""

    d: int
    heads: int
    kv_heads: int
    quantized: bool
    config: SplitConfig

    @property
    def count(self) -> int:
        """Return the number of features of a thread."""
        return BYTES // (1 if self.quantized else 2)

    @property
    def lanes(self) -> int:
        """Return the number of threads that share a position."""
        return self.d // self.count

    @property
    def rows(self) -> int:
        """Return the number of positions that a warp reads at once."""
        return threads.WARP // self.lanes

    @property
    def chunk(self) -> int:
        """Return the number of positions that a warp has in flight."""
        return self.config.loads * self.rows

    @property
    def workers(self) -> int:
        """Return the number of warps that share the positions."""
        return self.config.warps * self.config.splits

    @property
    def words(self) -> int:
        """Return the words a thread has in flight: keys, values, and the scales of both if there are any."""
        return 2 * self.config.loads * (BYTES // 4 + self.quantized)

    @property
    def state(self) -> int:
        """Return the numbers of a thread's state: for each query the largest score, the sum, and the mix of values."""
        return self.config.queries * (2 + self.count)


class KeyLane:
    """Locates a thread: the first of its features, and which of the positions read at once it holds."""

    def __init__(self, shape: HeadShape, split: Word):
        me = threads.thread()
        self.warp, self.lane = me // threads.WARP, me & (threads.WARP - 1)
        self.row, self.feature = self.lane // shape.lanes, (self.lane & (shape.lanes - 1)) * shape.count
        self.worker = split * shape.config.warps + self.warp
        self.shape = shape

    def position(self, step: Word, i: int) -> Word:
        """Return the position of load i of a step."""
        shape = self.shape
        chunk = step * shape.workers + self.worker
        return chunk * shape.chunk + (self.row + i * shape.rows)

    def over_features(self, value: Real, combine: Callable[[Real, Real], Real]) -> Real:
        """Return the values of a position's threads combined."""
        for i in range(self.shape.lanes.bit_length() - 1):
            value = combine(value, threads.shuffle(value, 1 << i))
        return value

    def over_rows(self, value: Real, combine: Callable[[Real, Real], Real]) -> Real:
        """Return the values of all positions read at once, combined."""
        for i in range(self.shape.rows.bit_length() - 1):
            value = combine(value, threads.shuffle(value, self.shape.lanes << i))
        return value


def fetch_angles(cos_gmem, sin_gmem, norm_scales, *, shape: HeadShape) -> jax.Array:
    """Start the loads of what `rotate_heads` needs besides the vectors, and return the words."""
    refs = [cos_gmem, sin_gmem, *norm_scales]

    @threads.on_threads(
        arg_types=(plgpu.RefType(),) * len(refs),
        return_type=threads.values(len(refs) * shape.count, jnp.float32),
    )
    def load(_, cos, sin, *scales):
        me, half = KeyLane(shape, threads.word(0)), shape.d // 2
        of_half = threads.select(me.feature >= half, me.feature - half, me.feature)
        found = [_load(ref, of_half, shape.count) for ref in (cos, sin)]
        found += [_load(ref, me.feature, shape.count) for ref in scales]
        return threads.as_array([each for vector in found for each in vector])

    return load(*refs)


def rotate_heads(q, kv, angles, *, shape: HeadShape, epsilon: float, shared: bool = False):
    """Return a thread's features of the rotated queries, and of the key and value for the cache.

    Queries and the key are normalised if there are norm scales, and rotated to their position. If the cache is int8,
    the key and the value are whole numbers, and their scales come after them.

    Args:
      q: queries, in global or in shared memory.
      kv: a key and a value, in the same memory.
      angles: from `fetch_angles`.
      shape: how the heads are split up.
      epsilon: added to the mean square in the norm.
      shared: whether q and kv are in shared memory.
    """
    count, queries = shape.count, shape.config.queries
    refs = [*q, *kv]

    @threads.on_threads(
        arg_types=(threads.per_thread(angles.shape[0] // 128), *[plgpu.RefType()] * len(refs)),
        return_type=(
            threads.values(queries * count, jnp.float32),
            threads.values(2 * (count + shape.quantized), jnp.float32),
        ),
    )
    def run(_, angles, *refs):
        me, half = KeyLane(shape, threads.word(0)), shape.d // 2
        found = threads.reals(angles)
        cos, sin, *scales = [found[i : i + count] for i in range(0, len(found), count)]
        vectors = [_load(ref, me.feature, count, shared=shared) for ref in refs]
        # The first half of the features subtracts the second, the second half adds the first.
        sign = threads.select(me.feature >= half, threads.real(1.0), threads.real(-1.0))
        rotated = []
        for i, vector in enumerate(vectors[:-1]):
            if scales:
                squares = functools.reduce(Real.__add__, [each * each for each in vector])
                factor = threads.reciprocal_root(
                    me.over_features(squares, Real.__add__) * (1 / shape.d) + epsilon
                )
                scale = scales[i == queries]
                # Round in between, as the reference does.
                vector = [(each * factor * s).to_bfloat16() for each, s in zip(vector, scale, strict=True)]
            others = [threads.shuffle(each, shape.lanes // 2) for each in vector]
            rotated.append(
                [
                    (each * c + other * (s * sign)).to_bfloat16()
                    for each, other, c, s in zip(vector, others, cos, sin, strict=True)
                ]
            )
        *rotated, key = rotated
        new, of_new = [key, vectors[-1]], []
        if shape.quantized:
            new, of_new = zip(*(_quantize(each, me) for each in new), strict=True)
        return (
            threads.as_array([each for vector in rotated for each in vector]),
            threads.as_array([*new[0], *new[1], *of_new]),
        )

    return run(angles, *refs)


def _load(ref: ir.Value, index: Word, count: int, *, shared: bool = False) -> list[Real]:
    """Return `count` numbers (a multiple of eight) of float32 or bf16, from `index` on."""
    size, values = threads.bits(ref) // 8, []
    for first in range(0, count, 8):
        offsets = [(index + first) * size + 16 * i for i in range(size // 2)]
        if shared:
            pieces = [threads.load(threads.address(ref) + offset, 4) for offset in offsets]
        else:
            pieces = [threads.load_global(ref, offset, 4) for offset in offsets]
        values += threads.eight_reals([word for piece in pieces for word in piece])
    return values


def _quantize(values: list[Real], me: KeyLane) -> tuple[list[Real], Real]:
    """Return whole numbers from −127 to 127, and their scale."""
    largest = functools.reduce(Real.most, [each.most(threads.real(0.0) - each) for each in values])
    scale = me.over_features(largest, Real.most).most(1e-8) / 127.0
    inverse = threads.real(1.0) / scale
    # Adding a number as large as WHOLE rounds to a whole number.
    return [each.times_plus(inverse, threads.WHOLE) - threads.WHOLE for each in values], scale
