"""Merges attention that blocks left in splits of the positions, where its reader does not (Pallas Mosaic GPU).

A thread merges two features of a head, so that all numbers are on their way at once.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from twla_jax.ops.attention.splits import LEAST_SUM, AttentionSplits
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.threads import Real

THREADS = 128  # of a block


def merge(splits: AttentionSplits) -> BFloat16[Array, "b heads_d"]:
    """Return `splits.merged()`, the mix over all positions, `[b, heads·d]`."""
    b, count, heads, _ = splits.softmax.shape
    width = splits.mixed.shape[-1]
    kernel: Any = pl.kernel(
        functools.partial(_kernel, shape=(b, count, heads), width=width),
        out_type=jax.ShapeDtypeStruct((b, width), splits.mixed.dtype),
        mesh=plgpu.Mesh(
            num_threads=1,
            thread_name="warpgroup",
            grid=(pl.cdiv(b * width // 2, THREADS),),
            grid_names=("words",),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="merge_attention_splits",
    )
    return kernel(splits.mixed, splits.softmax)


def _kernel(mixed_gmem, softmax_gmem, out_gmem, *, shape: tuple[int, int, int], width: int):
    b, splits, heads = shape
    words = width // 2  # of a sequence

    @threads.on_threads(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * 3))
    def run(_, block, mixed, softmax, out):
        index = threads.splat_word(block) * THREADS + threads.thread()
        with threads.when(index < b * words):
            sequence, word = index // words, index % words
            head, found = word // (words // heads), []
            for split in range(splits):
                row = sequence * splits + split
                (pair,) = threads.load_global(mixed, (row * words + word) * 4)
                found.append((pair, *threads.load_global(softmax, (row * heads + head) * 8, 2)))
            tops = [top.real() for _, top, _ in found]
            top = functools.reduce(Real.most, tops)
            shares = [
                threads.power_of_two(one - top) * total.real()
                for one, (*_, total) in zip(tops, found, strict=True)
            ]
            inverse = threads.reciprocal(functools.reduce(Real.__add__, shares).most(LEAST_SUM))
            sums = [threads.real(0.0)] * 2
            for (pair, *_), share in zip(found, shares, strict=True):
                numbers = threads.unpack_bfloat16(pair)
                sums = [each.times_plus(share, so_far) for each, so_far in zip(numbers, sums, strict=True)]
            threads.store_global_words(
                out, index * 4, [threads.pack_bfloat16(*(each * inverse for each in sums))]
            )

    run(lax.axis_index("words"), mixed_gmem, softmax_gmem, out_gmem)
