"""Multiplies many bf16 tokens by codes of four bits on Hopper GPUs (Pallas Mosaic GPU), on tensor cores.

It works as `gpu_many` does, in blocks of 128 rows, for LM heads: a code less its zero point is exact in bf16, and a
group's sum is scaled in float32. `gpu` has blocks of 64 rows, each of which reads all tokens again.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from twla_jax.core.packing import PLANE
from twla_jax.ops.hopper.limits import WARPGROUPS, WGMMA_ROWS
from twla_jax.ops.hopper.swizzle import swizzle_transforms
from twla_jax.ops.ternary_matmul import gpu_many_rings
from twla_jax.ops.ternary_matmul.gpu_many_rings import LAYOUT, ManyRings, ManyWork
from twla_jax.ops.ternary_matmul.gpu_unpack import unpack_floats, unpacked_order
from twla_jax.ops.ternary_matmul.tile_configs import ManyTileConfig
from twla_jax.ops.ternary_matmul.weight import PackedWeight
from twla_jax.ops.tokens import pad_columns

# Clusters of two blocks that share tokens took 181 µs for a head of 151936×4096, this 175 (H200).
_CONFIG = ManyTileConfig(tokens=64, lines=1, cluster=1, stages=3, x_slots=3, x_planes=2)


def obstacle(tokens: int, weight: PackedWeight) -> str | None:
    """Return why the kernel cannot take so many tokens or the weight, or None."""
    if 2 * tokens <= _CONFIG.tokens:
        return f"there are {tokens} tokens, at most half of a block's {_CONFIG.tokens}"
    if weight.bits == 4 and weight.relative and weight.grouped:
        return None
    return f"codes have {weight.bits} bits, not 4 with a zero point for every {PLANE} columns"


def product(
    x: Float[Array, "t m"],
    weight: PackedWeight,
    *,
    out_dtype,
    config: ManyTileConfig | None = None,
) -> Float[Array, "t rows"]:
    """Return what `reference.product` computes, for bf16 x."""
    t, config = len(x), config or _CONFIG
    # The copy engine swizzles pieces of 8 tokens by 128 bytes: it pads past the end, but cannot cut a piece.
    x = pad_columns(x) if x.shape[1] % PLANE else x
    x = unpacked_order(jnp.pad(x, ((0, -t % 8), (0, 0))))
    work = ManyWork(tokens=len(x), weight_rows=weight.rows, config=config)
    width = math.gcd(config.tokens, 256 // jnp.dtype(out_dtype).itemsize)
    y = plgpu.kernel(
        functools.partial(_kernel, work=work, weight=weight),
        out_type=jax.ShapeDtypeStruct((len(x), weight.rows), out_dtype),
        kernel_name="packed_matmul_many",
        scratch_types={
            "of_rings": gpu_many_rings.scratch_types(work, weight, x.dtype),
            "out_smem": plgpu.SMEM(
                (WARPGROUPS, width, WGMMA_ROWS),
                out_dtype,
                transforms=swizzle_transforms(jnp.dtype(out_dtype).itemsize),
            ),
        },
        **gpu_many_rings.launch(work),
    )(weight.codes, weight.gpu_scales, x)
    return y[:t]


def _kernel(codes_gmem, scales_gmem, x_gmem, out_gmem, *, of_rings, out_smem, work: ManyWork, weight):
    half = lax.axis_index("warpgroup")
    rings = FloatRings(work=work, weight=weight, **of_rings)

    @pl.when(half == WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @plgpu.warp_map
        def _(line):
            pl.when(line == 0)(lambda: rings.fill(line, codes_gmem, scales_gmem, x_gmem))

    @pl.when(half < WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        out, width = out_smem.at[half], out_smem.shape[1]

        @pl.loop(0, work.mine())
        def _(i):
            first_token, first_row = work.place(i)
            rows = pl.ds(first_row + half * WGMMA_ROWS, WGMMA_ROWS)
            y = rings.sums(i, jnp.int32(0), half)
            for j in range(0, y.shape[1], width):
                value = y[:, j : j + width].astype(out_smem.dtype)
                if out_smem.dtype.itemsize == 4:  # narrower numbers are transposed by the store
                    value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out.T[...] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, out_gmem.at[pl.ds(first_token + j, width), rows])

        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatRings(ManyRings):
    """Holds tiles of codes and of bf16 tokens in rings; the sums are scaled after every plane."""

    def sums(self, i: jax.Array, line, half: jax.Array) -> jax.Array:
        """Return the sums `[64, tokens]` float32 of this block's output i."""
        own, config, planes = self.own(line), self.work.config, self.weight.planes
        rows = pl.ds(half * WGMMA_ROWS, WGMMA_ROWS)
        zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, config.tokens), jnp.float32), LAYOUT)

        def step(k, y):
            slot = lax.rem(k, config.stages)
            plgpu.barrier_wait(self.filled.at[line * config.stages + slot])
            packed = plgpu.load(
                self.codes.at[line, slot, rows], layout=plgpu.Layout.WGMMA_8BIT, optimized=False
            )
            for plane in range(planes):
                share, place = divmod(plane, config.x_planes)
                x_slot, x_barrier = self._x_slot(k, share, line)
                alpha, mu = (
                    plgpu.load(
                        self.scales.at[line, slot, each, rows], layout=LAYOUT.reduce(1), optimized=False
                    )
                    for each in (plane, planes + plane)
                )
                # A weight is α·(C + μ), and a stored code C + 8.
                codes = unpack_floats(packed, plane, self.weight.offset - mu.astype(jnp.int32))
                if place == 0:
                    plgpu.barrier_wait(self.x_filled.at[x_barrier])
                tokens = self.x.at[line, x_slot, :, pl.ds(place * PLANE, PLANE)]
                multiply = functools.partial(_multiply, codes, tokens)
                sums = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(zeros))
                alpha = lax.broadcast_in_dim(alpha.astype(jnp.float32), sums.shape, (0,))
                y += plgpu.layout_cast(alpha, LAYOUT) * sums
                if place == config.x_planes - 1:
                    plgpu.barrier_arrive(self.x_freed.at[x_barrier])
            plgpu.barrier_arrive(self.freed.at[line * config.stages + slot])
            return y

        return lax.fori_loop(i * own, (i + 1) * own, step, zeros)


def _multiply(codes: jax.Array, tokens, sums_ref) -> None:
    plgpu.wgmma(sums_ref, codes, tokens.T)
