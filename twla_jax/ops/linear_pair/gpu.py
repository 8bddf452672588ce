"""Computes two linears in one kernel on Hopper GPUs (Pallas Mosaic GPU), for one token.

Every block computes some rows of the first linear, for which all blocks then wait, through global memory: see
`hopper.tags`. So all blocks must be resident at once, one to each multiprocessor. The second linear's first weights are
loaded meanwhile, but only as many as arrive before the first one's outputs do: those would queue up behind weights that
memory still has to deliver.
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
from twla_jax.ops.decode_attention import AttentionSplits
from twla_jax.ops.hopper import tags, threads
from twla_jax.ops.hopper.limits import STREAMING_MULTIPROCESSORS
from twla_jax.ops.linear_pair.operands import LinearOperands
from twla_jax.ops.quantized_linear import gpu_linear
from twla_jax.ops.rotate_quantize import gpu_rotation
from twla_jax.ops.ternary_matmul import gpu_ring, ring_tiles
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig
from twla_jax.ops.ternary_matmul.weight import KernelWeight

# Shared memory that both linears use, one after the other: each one's is a pair, or one.
_PAIRS = ("token_or_x_smem", "left_or_partials_smem")
_SINGLE = ("right_smem", "warps_smem")


@dataclasses.dataclass(frozen=True)
class _Link:
    """Describes how one of the two linears is split up."""

    rows: Rows
    config: RingTileConfig
    shape: gpu_rotation.TokenShape
    weight: KernelWeight
    epsilon: float | None

    @property
    def n(self) -> int:
        """Return the rows of each matrix."""
        return self.weight.out_features // self.rows.matrices

    @property
    def blocks(self) -> int:
        """Return the number of blocks that have rows."""
        return gpu_ring.block_count(self.n, self.rows)


def obstacle(
    x: jax.Array | AttentionSplits, first: LinearOperands, second: LinearOperands, residual: jax.Array
) -> str | None:
    """Return why the kernel cannot take such operands, or is slower than two ops; or None."""
    if residual.shape[0] != 1:
        return f"there are {residual.shape[0]} tokens, not one"
    if residual.dtype != jnp.bfloat16:
        return f"the residual is {residual.dtype}, not bfloat16"
    if reason := gpu_linear.obstacle(x, first.rotation, first.weight, wide=first.settings is None):
        return reason
    # The second one's token is as the residual.
    wide = second.settings is None
    if reason := gpu_linear.obstacle(residual, second.rotation, second.weight, gated=True, wide=wide):
        return reason
    try:
        _launch_plan(x, first, second, residual)
    except ValueError as error:
        return str(error)
    return None


def _launch_plan(
    x: jax.Array | AttentionSplits, first: LinearOperands, second: LinearOperands, residual: jax.Array
) -> tuple[_Link, _Link]:
    """Return how both linears are split up.

    Raises:
      ValueError: they are not split alike, not all blocks are resident at once, or it is not worth the wait.
    """
    of_first, of_second = (
        gpu_linear.memory_beside_weights(tokens, each.rotation, each.weight, wide=each.settings is None)
        for tokens, each in ((x, first), (residual, second))
    )
    most = max(of_first, of_second)
    wides = [each.settings is None for each in (first, second)]
    rows, config = gpu_linear.launch_plan(
        x, first.rotation, first.weight, wide=wides[0], beside=most - of_first
    )
    one = _link(x, first, rows, config)
    beside = most - of_second + ring_tiles.bytes_in_flight(config, 1)
    of_two = {"gated": True, "wide": wides[1], "beside": beside}
    two = _link(residual, second, *gpu_linear.launch_plan(residual, second.rotation, second.weight, **of_two))
    if config.warpgroups != two.config.warpgroups:
        raise ValueError(f"blocks would need {config.warpgroups} and {two.config.warpgroups} warpgroups")
    for link in (one, two):
        if link.n > link.blocks * link.rows.each:
            raise ValueError(f"blocks cannot compute {link.n} rows at once")
        if link.blocks > multiprocessors():
            raise ValueError(
                f"{link.blocks} blocks cannot all be resident on {multiprocessors()} multiprocessors"
            )
    if two.config.stages == two.config.ahead:
        raise ValueError("no weights would be left to load after the wait")
    return one, two


def _link(
    tokens: jax.Array | AttentionSplits, of: LinearOperands, rows: Rows, config: RingTileConfig
) -> _Link:
    shape = gpu_rotation.token_shape(tokens, of.rotation, config.warpgroups, wide=of.settings is None)
    return _Link(rows, config, shape, of.weight, None if of.norm_scale is None else of.epsilon)


def new_pair_exchange(residual: Float[Array, "1 n"]) -> Int32[Array, "1 words"]:
    """Return zeros: a word for each output of the first linear, and one for each block, all of one tag."""
    return jnp.zeros((1, residual.size + STREAMING_MULTIPROCESSORS), jnp.int32)


def linear_pair(
    x: BFloat16[Array, "1 m"] | AttentionSplits,
    first: LinearOperands,
    second: LinearOperands,
    residual: BFloat16[Array, "1 n"],
    exchange: Int32[Array, "1 words"],
) -> tuple[BFloat16[Array, "1 n"], BFloat16[Array, "1 hidden"], Int32[Array, "1 words"]]:
    """Return what `reference.linear_pair` computes, and the exchange with the next tag."""
    links = one, two = _launch_plan(x, first, second, residual)
    operands = _global_operands(x, first, second, residual)
    body = functools.partial(_kernel, links=links, count=len(operands[0]))
    kernel: Any = pl.kernel(
        lambda *refs: pl.run_scoped(
            functools.partial(body, *refs), collective_axes="warpgroup", **_scratch_types(links)
        ),
        out_type=tuple(jax.ShapeDtypeStruct((1, link.n), residual.dtype) for link in links),
        mesh=plgpu.Mesh(
            num_threads=one.config.warpgroups,
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


def _global_operands(
    x, first: LinearOperands, second: LinearOperands, residual
) -> list[tuple[jax.Array, ...]]:
    """Return the global-memory operands of each linear, but for outputs."""
    inputs = (x.mixed, x.softmax) if isinstance(x, AttentionSplits) else (x,)
    found = []
    for given, each in ((inputs, first), ((), second)):
        norm = () if each.norm_scale is None else (threads.readable(each.norm_scale),)
        found.append(gpu_linear.global_operands(given, each.rotation, each.settings, each.weight, norm))
    return [(*found[0], residual), found[1]]


def _scratch_types(links: tuple[_Link, _Link]) -> dict[str, Any]:
    """Return the shared memory of `_kernel`."""
    each = [gpu_linear.scratch_types(link.rows, link.config, link.shape, link.weight) for link in links]
    unions = {name: plgpu.RefUnion(*(ref for of in each for ref in of[name].refs)) for name in _PAIRS}
    unions |= {name: plgpu.RefUnion(*(of[name] for of in each)) for name in _SINGLE}
    return {"unions": unions, "own": [{k: ref for k, ref in of.items() if k not in unions} for of in each]}


def _kernel(exchange_gmem, *refs, unions, own, links: tuple[_Link, _Link], count: int):
    *operands, h_gmem, out_gmem = refs
    words = exchange_gmem.at[0]
    place = links[0].n + lax.axis_index("rows")
    tag = tags.next_tag(words, place)

    def stages_of(which: int, *of_linear, **options):
        memory = {name: unions[name][2 * which : 2 * which + 2] for name in _PAIRS}
        memory |= {name: unions[name][which] for name in _SINGLE}
        return gpu_linear.linear_stages(
            *of_linear,
            rows=links[which].rows,
            config=links[which].config,
            shape=links[which].shape,
            weight=links[which].weight,
            epsilon=links[which].epsilon,
            of_all=max(link.blocks for link in links),
            **memory,
            **own[which],
            **options,
        )

    outputs = gpu_ring.RingOutputs(stored=h_gmem, sent=words, tag=tag), gpu_ring.RingOutputs(stored=out_gmem)
    start_first, finish_first = stages_of(
        0, *operands[:count], outputs=outputs[0], ahead=links[0].config.stages
    )
    start_second, finish_second = stages_of(1, *operands[count:], outputs=outputs[1], received=(words, tag))
    start_first()
    start_second()
    finish_first()
    tags.keep_tag(words, place, tag)
    finish_second()
