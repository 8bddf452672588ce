"""Scales many tokens' sums, and copies them out through shared memory (Mosaic GPU)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.hopper.epilogue import rescale
from twla_jax.ops.hopper.limits import WGMMA_ROWS
from twla_jax.ops.hopper.swizzle import swizzle_transforms
from twla_jax.ops.ternary_matmul.gpu_many_rings import LAYOUT, ManyWork


def scratch_types(work: ManyWork, dtype, *, grouped: bool, wide: bool = False) -> dict[str, Any]:
    """Return the shared memory of `ManyOutputs`, by its fields, for each half of a block's rows."""
    halves, tokens, itemsize = work.halves, work.config.tokens, jnp.dtype(dtype).itemsize
    return {
        "of_tokens": plgpu.SMEM(
            (halves, 3, max(tokens, 32)), jnp.float32
        ),  # the copy engine writes 128 bytes
        "of_rows": plgpu.SMEM((halves, 3, WGMMA_ROWS), jnp.float32),
        "scales": plgpu.SMEM((halves, 2, WGMMA_ROWS), jnp.float16),
        "out": plgpu.SMEM(
            (halves, math.gcd(tokens // 2 if wide else tokens, 256 // itemsize), WGMMA_ROWS),
            dtype,
            transforms=swizzle_transforms(itemsize),
        ),
        "loaded": plgpu.Barrier(num_arrivals=5 if grouped else 7, num_barriers=halves),
        "residual_loaded": plgpu.Barrier(num_barriers=halves),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyOutputs:
    """Writes the outputs of one half of a block's rows.

    In global memory are each token's scale and zero point, and each row's sum and bias; where rows have several
    groups also their steps, else α and μ of rows and the tokens' sums; and the outputs, and the residual if there is
    one. If `wide`, the second half of the sums is added to the first.
    """

    half: jax.Array
    wide: bool
    scale_gmem: Any
    zero_point_gmem: Any
    row_sums_gmem: Any
    bias_gmem: Any
    steps_gmem: Any
    scales_gmem: Any
    sums_gmem: Any
    residual_gmem: Any
    out_gmem: Any
    of_tokens: Any
    of_rows: Any
    scales: Any
    out: Any
    loaded: Any
    residual_loaded: Any

    def fetch(self, first_token: jax.Array, first_row: jax.Array) -> None:
        """Start the loads of all that is needed besides the sums."""
        tokens, rows = pl.ds(first_token, self.of_tokens.shape[-1]), pl.ds(first_row, WGMMA_ROWS)

        def copy(source, target):
            plgpu.copy_gmem_to_smem(source, target, self.loaded.at[self.half])

        for j, source in enumerate((self.scale_gmem, self.zero_point_gmem)):
            copy(source.at[tokens], self.of_tokens.at[self.half, j])
        for j, source in enumerate((self.row_sums_gmem, self.bias_gmem)):
            copy(source.at[rows], self.of_rows.at[self.half, j])
        if self.steps_gmem is not None:
            copy(self.steps_gmem.at[rows], self.of_rows.at[self.half, 2])
        else:
            copy(self.sums_gmem.at[tokens], self.of_tokens.at[self.half, 2])
            for j in range(2):
                copy(self.scales_gmem.at[0, j, rows], self.scales.at[self.half, j])
        self._fetch_residual(first_token, first_row)

    def finish(self, sums: jax.Array, first_token: jax.Array, first_row: jax.Array) -> None:
        """Scale sums `[64, tokens]`, and copy them to their place, some tokens at a time."""
        plgpu.barrier_wait(self.loaded.at[self.half])
        width, count = self.out.shape[1], sums.shape[1] // 2 if self.wide else sums.shape[1]
        for j in range(0, count, width):
            if j:
                self._fetch_residual(first_token + j, first_row)
            y = self._scaled(sums[:, j : j + width], j)
            if self.wide:
                y += self._scaled(sums[:, count + j : count + j + width], count + j, biased=False)
            self._write(y, first_token + j, first_row)

    def _fetch_residual(self, first_token, first_row) -> None:
        """Load the residual into the place of the outputs, once the outputs before have left it."""
        if self.residual_gmem is None:
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        source = self.residual_gmem.at[pl.ds(first_token, self.out.shape[1]), pl.ds(first_row, WGMMA_ROWS)]
        plgpu.copy_gmem_to_smem(source, self.out.at[self.half], self.residual_loaded.at[self.half])

    def _scaled(self, sums: jax.Array, j: int, *, biased: bool = True) -> jax.Array:
        """Return the outputs of sums `[64, width]` of tokens from `j` on, in float32."""
        shape, width = sums.shape, self.out.shape[1]

        def spread(values, axis):
            return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (axis,)), LAYOUT)

        def of_token(kind):
            ref = self.of_tokens.at[self.half, kind, pl.ds(j, width)]
            return spread(plgpu.load(ref, layout=LAYOUT.reduce(0), optimized=False), 1)

        def of_row(ref, kind):
            values = plgpu.load(ref.at[self.half, kind], layout=LAYOUT.reduce(1), optimized=False)
            return spread(values.astype(jnp.float32), 0)

        y = sums.astype(jnp.float32)
        if self.steps_gmem is not None:
            y *= of_row(self.of_rows, 2)
        else:
            alpha, mu = (of_row(self.scales, kind) for kind in range(2))
            # U = T + 1, and both are whole numbers that float32 holds.
            y = alpha * (y - of_token(2)) + mu * of_token(2)
        row_sums, bias = (of_row(self.of_rows, kind) for kind in range(2))
        return rescale(y, of_token(0), of_token(1), row_sums, bias if biased else None)

    def _write(self, y: jax.Array, first_token, first_row) -> None:
        """Copy outputs `[64, width]` to their place, and the residual with them."""
        width = self.out.shape[1]
        value, out = y.astype(self.out.dtype), self.out.at[self.half]
        if self.residual_gmem is not None:
            plgpu.barrier_wait(self.residual_loaded.at[self.half])
            value += plgpu.load(out.T, layout=LAYOUT, optimized=False)
            plgpu.commit_smem()  # all threads have read it before it is overwritten
        if self.out.dtype.itemsize == 4:  # narrower numbers are transposed by the store
            value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out.T[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            out, self.out_gmem.at[pl.ds(first_token, width), pl.ds(first_row, WGMMA_ROWS)]
        )
