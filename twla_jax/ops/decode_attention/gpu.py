"""Attention of one new token in one kernel on Hopper GPUs (Pallas Mosaic GPU), bound by the cache's way from memory.

A cluster of blocks shares the positions of one key head; the warpgroups of its blocks go over tiles of 64 positions,
each with its own ring in shared memory. Queries of a key head are the 16 rows of `mma.sync`. The new token's own key
and value never pass through the cache: they are where the softmax of the first warpgroup begins, while its first tile
is under way. Sums of the warpgroups meet in shared memory; those of the blocks do so in the cluster's, where each block
adds up a share of the features.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref
from jaxtyping import Array, BFloat16, Float, Int32

from twla_jax.models.attention import Positions
from twla_jax.models.kv_cache import LayerKV
from twla_jax.ops.decode_attention import tiles as tuning
from twla_jax.ops.decode_attention.tiles import KEYS

_ROWS = 16  # of `mma.sync`, all four warps' together: they share its columns
_LOWEST = -1e30  # in place of −∞, whose difference from itself is no number
_CHUNK = 32  # columns that four warps have at least
LHS, RHS, ACC = (
    kind(jnp.bfloat16, m_warps=1)
    for kind in (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
)


def obstacle(qkv: jax.Array, layer: LayerKV) -> str | None:
    """Why the kernel cannot take such operands, or None."""
    _, _, kv_heads, size, d = layer.entries.shape
    if qkv.dtype != jnp.bfloat16 or layer.entries.dtype != jnp.bfloat16:
        return f"queries are {qkv.dtype} and the cache is {layer.entries.dtype}, not bfloat16"
    if d % 64 or d > 192:
        return f"heads have {d} features, not 64, 128 or 192"
    if (queries := qkv.shape[1] // kv_heads - 2) > _ROWS:
        return f"{queries} queries share a key head, more than {_ROWS}"
    # The copy engine swizzles 8 positions at once: it fills up what lies past the end, but cuts no such piece.
    return f"the cache has room for {size} positions, not a multiple of 8" if size % 8 else None


def decode_attention(
    qkv: BFloat16[Array, "b all_heads d"],
    layer: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    norm_scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None = None,
    *,
    epsilon: float = 0.0,
    tiles: tuning.Tiles | None = None,
) -> tuple[BFloat16[Array, "b heads_d"], LayerKV]:
    """What `reference.decode_attention` computes, in bf16."""
    b, all_heads, d = qkv.shape
    _, _, kv_heads, size, _ = layer.entries.shape
    heads = all_heads - 2 * kv_heads
    tiles = tiles or tuning.tiles(b * kv_heads, size, d)
    splits, groups, stages = tiles.splits, tiles.warpgroups, tiles.stages
    chunks = d // _CHUNK // _receivers(splits, d)
    scratch = {
        "k_smem": plgpu.SMEM((groups, stages, KEYS, d), jnp.bfloat16, transforms=_swizzled(2)),
        "v_smem": plgpu.SMEM((groups, stages, KEYS, d), jnp.bfloat16, transforms=_swizzled(2)),
        # 8 more columns than there are scores, so that rows lie in different banks.
        "scores_smem": plgpu.SMEM((groups, _ROWS, KEYS + 8), jnp.float32),
        "k_filled": plgpu.Barrier(num_barriers=groups * stages),
        "v_filled": plgpu.Barrier(num_barriers=groups * stages),
    }
    if groups > 1:
        scratch |= {
            "parts_smem": plgpu.SMEM((groups, _ROWS, d), jnp.float32),
            "part_sums_smem": plgpu.SMEM((groups, _ROWS), jnp.float32),
            "added": plgpu.Barrier(num_arrivals=groups),
        }
    if splits > 1:
        scratch |= {
            "splits_smem": plgpu.SMEM((splits, chunks, _ROWS, _CHUNK), jnp.float32, transforms=_swizzled(4)),
            "split_sums_smem": plgpu.SMEM((splits, _ROWS, _CHUNK), jnp.float32, transforms=_swizzled(4)),
            "gathered": plgpu.Barrier(num_arrivals=(1 + chunks) * splits),
        }
    body = functools.partial(_kernel, tiles=tiles, heads=heads, epsilon=epsilon)
    cluster = {"cluster": (splits,), "cluster_names": ("split",)} if splits > 1 else {}
    kernel: Any = pl.kernel(
        lambda *refs: pl.run_scoped(functools.partial(body, *refs), collective_axes="warpgroup", **scratch),
        out_type=(jax.ShapeDtypeStruct((b, heads, d), jnp.bfloat16),),
        mesh=plgpu.Mesh(
            grid=(b * kv_heads,),
            grid_names=("head",),
            num_threads=groups,
            thread_name="warpgroup",
            **cluster,
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="decode_attention",
    )
    entries = jax.new_ref(layer.entries)
    (mixed,) = kernel(
        entries,
        qkv,
        positions.cos[0],
        positions.sin[0],
        positions.query[:1],
        window.reshape(1),
        *(norm_scales or ()),
    )
    return mixed.reshape(b, heads * d), LayerKV(entries=jax.freeze(entries))


def _kernel(
    entries_gmem,
    qkv_gmem,
    cos_gmem,
    sin_gmem,
    length_gmem,
    window_gmem,
    *refs,
    k_smem,
    v_smem,
    scores_smem,
    k_filled,
    v_filled,
    parts_smem: Any = None,
    part_sums_smem: Any = None,
    added: Any = None,
    splits_smem: Any = None,
    split_sums_smem: Any = None,
    gathered: Any = None,
    tiles: tuning.Tiles,
    heads: int,
    epsilon: float,
):
    *norm_scales, out_gmem = refs
    _, _, kv_heads, _, d = entries_gmem.shape
    half, queries, stages = d // 2, heads // kv_heads, tiles.stages
    sequence, head = (op(lax.axis_index("head"), jnp.int32(kv_heads)) for op in (lax.div, lax.rem))
    group = lax.axis_index("warpgroup")
    split = lax.axis_index("split") if tiles.splits > 1 else jnp.int32(0)
    worker, workers = split * tiles.warpgroups + group, tiles.splits * tiles.warpgroups
    length = length_gmem[0]
    start = jnp.maximum(length + 1 - window_gmem[0], 0)
    first = lax.div(start, KEYS) + worker
    steps = jnp.maximum(lax.div(lax.div(length + KEYS - 1, KEYS) - first + workers - 1, workers), 0)

    def fetch(step, slot):
        positions = pl.ds((first + step * workers) * KEYS, KEYS)
        for i, (ring, filled) in enumerate(((k_smem, k_filled), (v_smem, v_filled))):
            plgpu.copy_gmem_to_smem(
                entries_gmem.at[i, sequence, head, positions],
                ring.at[group, slot],
                filled.at[group * stages + slot],
            )

    for slot in range(stages):
        pl.when(slot < steps)(functools.partial(fetch, jnp.int32(slot), slot))

    def load_halves(ref):
        parts = pl.ds(0, half), pl.ds(half, half)
        halves = [plgpu.load(ref.at[part], layout=LHS.reduce(0), optimized=False) for part in parts]
        return [values.astype(jnp.float32) for values in halves]

    cos, sin = (plgpu.load(ref, layout=LHS.reduce(0), optimized=False) for ref in (cos_gmem, sin_gmem))
    scales = [load_halves(ref) for ref in norm_scales]

    def load_turned(row, *scale):
        """The halves of a head, normed if a scale is given, and turned to its position."""
        x, y = load_halves(qkv_gmem.at[sequence, row])
        for ends in scale:
            factor = lax.rsqrt((jnp.sum(x * x) + jnp.sum(y * y)) / d + epsilon)
            # Rounded in between, as the reference does.
            x, y = (
                (values * factor * end).astype(jnp.bfloat16).astype(jnp.float32)
                for values, end in zip((x, y), ends, strict=True)
            )
        return (x * cos - y * sin).astype(jnp.bfloat16), (y * cos + x * sin).astype(jnp.bfloat16)

    k = load_turned(heads + head, *scales[1:])
    q = tuple(_spread(part, (_ROWS, half), 1, LHS) for part in load_turned(head * queries, *scales[:1]))
    row = plgpu.broadcasted_iota(jnp.int32, (_ROWS, half), 0, layout=LHS)
    for i in range(1, queries):
        more = load_turned(head * queries + i, *scales[:1])
        q = tuple(
            jnp.where(row == i, _spread(part, (_ROWS, half), 1, LHS), sofar)
            for part, sofar in zip(more, q, strict=True)
        )
    v = plgpu.load(qkv_gmem.at[sequence, heads + kv_heads + head], layout=ACC.reduce(0), optimized=False)

    @pl.when(worker == 0)
    def _():
        of_head = entries_gmem.at[:, sequence, head, length]
        of_head.at[0, pl.ds(0, half)][...] = k[0]
        of_head.at[0, pl.ds(half, half)][...] = k[1]
        of_head.at[1][...] = v

    factor = d**-0.5 * math.log2(math.e)
    own = sum(
        jnp.sum(a.astype(jnp.float32) * _spread(b.astype(jnp.float32), (_ROWS, half), 1, LHS), axis=1)
        for a, b in zip(q, k, strict=True)
    )
    mine = worker == 0
    top = jnp.where(mine, own * factor, _LOWEST)
    total = plgpu.layout_cast(jnp.where(mine, jnp.ones_like(own), 0.0), LHS.reduce(1))
    mixed = jnp.where(mine, _spread(v.astype(jnp.float32), (_ROWS, d), 1, ACC), 0.0)
    column = plgpu.broadcasted_iota(jnp.int32, (_ROWS, KEYS), 1, layout=LHS)
    zero = plgpu.layout_cast(jnp.zeros((_ROWS, KEYS), jnp.float32), ACC)
    # Scores are the left operand of the next product, which every warp has whole, so that it needs no other for
    # their maximum and sum.
    exchanged = scores_smem.at[group, :, pl.ds(0, KEYS)]

    def step(k, carry):
        top, total, mixed = carry
        slot = lax.rem(k, jnp.int32(stages))
        barrier = group * stages + slot
        plgpu.barrier_wait(k_filled.at[barrier])
        keys = plgpu.load(k_smem.at[group, slot].T, layout=RHS)
        exchanged[...] = plgpu.mma(plgpu.mma(zero, q[0], keys[:half]), q[1], keys[half:])
        position = (first + k * workers) * KEYS + column
        visible = (position < length) & (position >= start)
        scores = plgpu.load(exchanged, layout=LHS, optimized=False) * factor
        scores = jnp.where(visible, scores, _LOWEST)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - _spread(new_top, (_ROWS, KEYS), 0, LHS))
        weights = jnp.where(visible, weights, 0.0)
        fade = jnp.exp2(top - new_top)
        total = total * fade + jnp.sum(weights, axis=1)
        plgpu.barrier_wait(v_filled.at[barrier])
        values = plgpu.load(v_smem.at[group, slot], layout=RHS)
        pl.when(k + stages < steps)(functools.partial(fetch, k + stages, slot))
        mixed = mixed * _spread(_of_sum(fade), (_ROWS, d), 0, ACC)
        return new_top, total, plgpu.mma(mixed, weights.astype(jnp.bfloat16), values)

    top, total, mixed = lax.fori_loop(0, steps, step, (top, total, mixed))
    total = jnp.maximum(total, 1e-30)
    part = mixed / _spread(_of_sum(total), (_ROWS, d), 0, ACC), _of_sum(top + jnp.log2(total))

    def finish(part):
        mixed, log_total = part
        if tiles.splits == 1:
            _store(mixed, out_gmem.at[sequence, pl.ds(head * queries, queries)])
            return

        def send(value, ref, receiver):
            plgpu.async_store_smem(
                value,
                ref,
                gathered,
                cluster_idx=jnp.int32(receiver),
                cluster_dim="split",
                optimized=False,
            )

        receivers = _receivers(tiles.splits, d)
        for i in range(d // _CHUNK):
            chunk = mixed[:, i * _CHUNK : (i + 1) * _CHUNK]
            send(chunk, splits_smem.at[split, i // receivers], i % receivers)
        for i in range(receivers):
            send(_spread(log_total, (_ROWS, _CHUNK), 0, ACC), split_sums_smem.at[split], i)
        pl.when(split < receivers)(functools.partial(gather, receivers))

    def gather(receivers):
        plgpu.barrier_wait(gathered)

        def load(ref):
            return [plgpu.load(ref(i), layout=ACC, optimized=False) for i in range(tiles.splits)]

        weights, _ = _weights(load(lambda i: split_sums_smem.at[i]))
        for j in range(splits_smem.shape[1]):
            chunks = load(lambda i, j=j: splits_smem.at[i, j])
            mixed = sum(w * chunk for w, chunk in zip(weights, chunks, strict=True))
            columns = pl.ds((j * receivers + split) * _CHUNK, _CHUNK)
            _store(mixed, out_gmem.at[sequence, pl.ds(head * queries, queries), columns])

    if tiles.warpgroups == 1:
        finish(part)
        return
    parts_smem[group], part_sums_smem[group] = part
    plgpu.barrier_arrive(added)

    @pl.when(group == 0)
    def _():
        plgpu.barrier_wait(added)
        rows = ACC.reduce(1)
        sums = [
            plgpu.load(part_sums_smem.at[i], layout=rows, optimized=False) for i in range(tiles.warpgroups)
        ]
        weights, log_total = _weights(sums)
        mixed = sum(
            _spread(w, (_ROWS, d), 0, ACC) * plgpu.load(parts_smem.at[i], layout=ACC, optimized=False)
            for i, w in enumerate(weights)
        )
        finish((mixed, log_total))


def _receivers(splits: int, d: int) -> int:
    """The blocks of a cluster that each add up a part of the features."""
    return math.gcd(splits, d // _CHUNK)


def _weights(sums):
    """Shares of the parts whose sums' base-2 logarithms are given, and the logarithm of the whole sum."""
    top = functools.reduce(jnp.maximum, sums)
    shares = [jnp.exp2(part - top) for part in sums]
    total = functools.reduce(jnp.add, shares)
    return [share / total for share in shares], top + jnp.log2(total)


def _spread(x, shape: tuple[int, int], axis: int, layout):
    """A vector along `axis` of a matrix."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (axis,)), layout)


def _of_sum(x):
    """A value for each query, as the sums of a product have them."""
    return plgpu.layout_cast(x, ACC.reduce(1))


def _store(y, out_gmem) -> None:
    """Writes as many rows as there are queries."""
    queries = out_gmem.shape[0]

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType()))
    def put_registers(_, y, out):
        def put(value, position):
            row, column = position
            with utils.when(arith.cmpi(arith.CmpIPredicate.ult, row, utils.c(queries, ir.IndexType.get()))):
                memref.store(value, out, [row, column])

        y.foreach(put)

    put_registers(y.astype(out_gmem.dtype), out_gmem)  # pyright: ignore[reportCallIssue]


def _swizzled(itemsize: int):
    tiling = plgpu.TilingTransform((8, 128 // itemsize))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
