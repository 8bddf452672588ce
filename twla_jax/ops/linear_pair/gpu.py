"""Two linears in one kernel on Hopper GPUs (Pallas Mosaic GPU), for one token.

Every block makes some rows of the first one, which all blocks then wait for, through memory: `gpu_tags`. So all blocks
must be there at once, one to each multiprocessor. The second one's first weights come meanwhile, but only as many as
are there before the first one's outputs are: those would queue up behind what memory still has to bring.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from twla_jax.devices import multiprocessors
from twla_jax.ops.decode_attention import AttentionParts
from twla_jax.ops.hopper import tags
from twla_jax.ops.hopper import threads as threads
from twla_jax.ops.linear_pair.operands import LinearOperands
from twla_jax.ops.quantized_linear import gpu as linear
from twla_jax.ops.rotate_quantize import gpu_token as turning
from twla_jax.ops.ternary_matmul import gpu_ring as ring
from twla_jax.ops.ternary_matmul import ring_tiles
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import Tiles
from twla_jax.ops.ternary_matmul.tile_configs import STREAMING_MULTIPROCESSORS
from twla_jax.ops.ternary_matmul.weight import KernelWeight

# Shared memory that both linears use, one after the other: each one's is a pair, or one.
_PAIRS = ("token_or_x_smem", "left_or_parts_smem")
_SINGLE = ("right_smem", "warps_smem")


@dataclasses.dataclass(frozen=True)
class _Link:
    """How one of the two is split up."""

    rows: Rows
    tiles: Tiles
    shape: turning.Shape
    weight: KernelWeight
    epsilon: float | None

    @property
    def n(self) -> int:
        """Rows of each part."""
        return self.weight.out_features // self.rows.parts

    @property
    def blocks(self) -> int:
        """That have rows."""
        return ring.blocks(self.n, self.rows)


def obstacle(
    x: jax.Array | AttentionParts, first: LinearOperands, second: LinearOperands, residual: jax.Array
) -> str | None:
    """Why the kernel cannot take such operands, or is slower than two ops; or None."""
    if residual.shape[0] != 1:
        return f"there are {residual.shape[0]} tokens, not one"
    if residual.dtype != jnp.bfloat16:
        return f"the residual is {residual.dtype}, not bfloat16"
    if reason := linear.obstacle(x, first.rotation, first.weight, wide=first.settings is None):
        return reason
    # The second one's token is as the residual.
    wide = second.settings is None
    if reason := linear.obstacle(residual, second.rotation, second.weight, gated=True, wide=wide):
        return reason
    try:
        _plan(x, first, second, residual)
    except ValueError as error:
        return str(error)
    return None


def _plan(
    x: jax.Array | AttentionParts, first: LinearOperands, second: LinearOperands, residual: jax.Array
) -> tuple[_Link, _Link]:
    """How both are split up.

    Raises:
      ValueError: they are not split alike, not all blocks are there at once, or it is not worth the wait.
    """
    of_first, of_second = (
        linear.beside_weights(tokens, each.rotation, each.weight, wide=each.settings is None)
        for tokens, each in ((x, first), (residual, second))
    )
    most = max(of_first, of_second)
    wides = [each.settings is None for each in (first, second)]
    rows, tiles = linear.plan(x, first.rotation, first.weight, wide=wides[0], beside=most - of_first)
    one = _link(x, first, rows, tiles)
    beside = most - of_second + ring_tiles.under_way(tiles, 1)
    of_two = {"gated": True, "wide": wides[1], "beside": beside}
    two = _link(residual, second, *linear.plan(residual, second.rotation, second.weight, **of_two))
    if tiles.warpgroups != two.tiles.warpgroups:
        raise ValueError(f"blocks have {tiles.warpgroups} and {two.tiles.warpgroups} warpgroups")
    for link in (one, two):
        if link.n > link.blocks * link.rows.each:
            raise ValueError(f"blocks cannot take {link.n} rows at once")
        if link.blocks > multiprocessors():
            raise ValueError(f"there are {link.blocks} blocks for {multiprocessors()} multiprocessors")
    if two.tiles.stages == two.tiles.ahead:
        raise ValueError("no weights are left to come after the wait")
    return one, two


def _link(tokens: jax.Array | AttentionParts, of: LinearOperands, rows: Rows, tiles: Tiles) -> _Link:
    shape = turning.shape(tokens, of.rotation, tiles.warpgroups, wide=of.settings is None)
    return _Link(rows, tiles, shape, of.weight, None if of.norm_scale is None else of.epsilon)


def new_exchange(residual: Float[Array, "1 n"]) -> Int32[Array, "1 words"]:
    """A word for each output of the first linear, and one for each block, of one tag."""
    return jnp.zeros((1, residual.size + STREAMING_MULTIPROCESSORS), jnp.int32)


def linear_pair(
    x: BFloat16[Array, "1 m"] | AttentionParts,
    first: LinearOperands,
    second: LinearOperands,
    residual: BFloat16[Array, "1 n"],
    exchange: Int32[Array, "1 words"],
) -> tuple[BFloat16[Array, "1 n"], BFloat16[Array, "1 hidden"], Int32[Array, "1 words"]]:
    """What `reference.linear_pair` computes, and the exchange with the next tag."""
    links = one, two = _plan(x, first, second, residual)
    operands = _operands(x, first, second, residual)
    body = functools.partial(_kernel, links=links, count=len(operands[0]))
    kernel: Any = pl.kernel(
        lambda *refs: pl.run_scoped(
            functools.partial(body, *refs), collective_axes="warpgroup", **_memory(links)
        ),
        out_type=tuple(jax.ShapeDtypeStruct((1, link.n), residual.dtype) for link in links),
        mesh=plgpu.Mesh(
            num_threads=one.tiles.warpgroups,
            thread_name="warpgroup",
            grid=(max(one.blocks, two.blocks),),
            grid_names=("rows",),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="linear_pair",
    )
    words = jax.new_ref(exchange)
    h, y = kernel(words, *operands[0], *operands[1])
    return h, y, jax.freeze(words)


def _operands(x, first: LinearOperands, second: LinearOperands, residual) -> list[tuple[jax.Array, ...]]:
    """What each of the two has of global memory, but for outputs."""
    inputs = (x.mixed, x.softmax) if isinstance(x, AttentionParts) else (x,)
    found = []
    for given, each in ((inputs, first), ((), second)):
        norm = () if each.norm_scale is None else (threads.readable(each.norm_scale),)
        found.append(linear.operands(given, each.rotation, each.settings, each.weight, norm))
    return [(*found[0], residual), found[1]]


def _memory(links: tuple[_Link, _Link]) -> dict[str, Any]:
    """What `_kernel` has of shared memory."""
    each = [linear.memory(link.rows, link.tiles, link.shape, link.weight) for link in links]
    unions = {name: plgpu.RefUnion(*(ref for of in each for ref in of[name].refs)) for name in _PAIRS}
    unions |= {name: plgpu.RefUnion(*(of[name] for of in each)) for name in _SINGLE}
    return {"unions": unions, "own": [{k: ref for k, ref in of.items() if k not in unions} for of in each]}


def _kernel(exchange_gmem, *refs, unions, own, links: tuple[_Link, _Link], count: int):
    *operands, h_gmem, out_gmem = refs
    words = exchange_gmem.at[0]
    place = links[0].n + lax.axis_index("rows")
    tag = tags.next_tag(words, place)

    def begin(which: int, *of_linear, **options):
        memory = {name: unions[name][2 * which : 2 * which + 2] for name in _PAIRS}
        memory |= {name: unions[name][which] for name in _SINGLE}
        return linear.begin(
            *of_linear,
            rows=links[which].rows,
            tiles=links[which].tiles,
            shape=links[which].shape,
            weight=links[which].weight,
            epsilon=links[which].epsilon,
            of_all=max(link.blocks for link in links),
            **memory,
            **own[which],
            **options,
        )

    outputs = ring.Outputs(stored=h_gmem, sent=words, tag=tag), ring.Outputs(stored=out_gmem)
    start, end = begin(0, *operands[:count], outputs=outputs[0], ahead=links[0].tiles.stages)
    start_second, end_second = begin(1, *operands[count:], outputs=outputs[1], received=(words, tag))
    start()
    start_second()
    end()
    tags.keep_tag(words, place, tag)
    end_second()
