"""What many tokens' sums are scaled by, and their way out through shared memory (Mosaic GPU)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.ternary_matmul.gpu_many_rings import LAYOUT, ROWS, Work, swizzled


def memory(work: Work, dtype, *, grouped: bool) -> dict[str, Any]:
    """What `Outputs` has of shared memory, by its fields: for each part of a block's rows."""
    parts, tokens, itemsize = work.parts, work.tiles.tokens, jnp.dtype(dtype).itemsize
    return {
        "of_tokens": plgpu.SMEM((parts, 3, tokens), jnp.float32),
        "of_rows": plgpu.SMEM((parts, 3, ROWS), jnp.float32),
        "scales": plgpu.SMEM((parts, 2, ROWS), jnp.float16),
        "out": plgpu.SMEM(
            (parts, math.gcd(tokens, 256 // itemsize), ROWS), dtype, transforms=swizzled(itemsize)
        ),
        "loaded": plgpu.Barrier(num_arrivals=5 if grouped else 7, num_barriers=parts),
        "residual_loaded": plgpu.Barrier(num_barriers=parts),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Of the warpgroup that finishes part `part` of a block's rows.

    In global memory are each token's scale and zero point, each row's sum and bias, and where rows have several groups
    their steps, else α and μ of rows and the tokens' sums; and the residual, if there is one, and the outputs.
    """

    part: jax.Array
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
        """Starts the way of all that is needed beside the sums."""
        tokens, rows = pl.ds(first_token, self.of_tokens.shape[-1]), pl.ds(first_row, ROWS)

        def copy(source, target):
            plgpu.copy_gmem_to_smem(source, target, self.loaded.at[self.part])

        for j, source in enumerate((self.scale_gmem, self.zero_point_gmem)):
            copy(source.at[tokens], self.of_tokens.at[self.part, j])
        for j, source in enumerate((self.row_sums_gmem, self.bias_gmem)):
            copy(source.at[rows], self.of_rows.at[self.part, j])
        if self.steps_gmem is not None:
            copy(self.steps_gmem.at[rows], self.of_rows.at[self.part, 2])
        else:
            copy(self.sums_gmem.at[tokens], self.of_tokens.at[self.part, 2])
            for j in range(2):
                copy(self.scales_gmem.at[0, j, rows], self.scales.at[self.part, j])
        self._fetch_residual(first_token, first_row)

    def finish(self, sums: jax.Array, first_token: jax.Array, first_row: jax.Array) -> None:
        """Scales sums `[64, tokens]`, and sends them to their place, some tokens at a time."""
        plgpu.barrier_wait(self.loaded.at[self.part])
        width = self.out.shape[1]
        for j in range(0, sums.shape[1], width):
            if j:
                self._fetch_residual(first_token + j, first_row)
            self._write(sums[:, j : j + width], j, first_token + j, first_row)

    def _fetch_residual(self, first_token, first_row) -> None:
        """What is to be added, into the place of the outputs, once those before have left it."""
        if self.residual_gmem is None:
            return
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        source = self.residual_gmem.at[pl.ds(first_token, self.out.shape[1]), pl.ds(first_row, ROWS)]
        plgpu.copy_gmem_to_smem(source, self.out.at[self.part], self.residual_loaded.at[self.part])

    def _write(self, sums: jax.Array, j: int, first_token, first_row) -> None:
        shape, width = sums.shape, self.out.shape[1]

        def spread(values, axis):
            return plgpu.layout_cast(lax.broadcast_in_dim(values, shape, (axis,)), LAYOUT)

        def of_token(kind):
            ref = self.of_tokens.at[self.part, kind, pl.ds(j, width)]
            return spread(plgpu.load(ref, layout=LAYOUT.reduce(0), optimized=False), 1)

        def of_row(ref, kind):
            values = plgpu.load(ref.at[self.part, kind], layout=LAYOUT.reduce(1), optimized=False)
            return spread(values.astype(jnp.float32), 0)

        y = sums.astype(jnp.float32)
        if self.steps_gmem is not None:
            y *= of_row(self.of_rows, 2)
        else:
            alpha, mu = (of_row(self.scales, kind) for kind in range(2))
            # U = T + 1, and both are whole numbers that float32 holds.
            y = alpha * (y - of_token(2)) + mu * of_token(2)
        row_sums, bias = (of_row(self.of_rows, kind) for kind in range(2))
        y = of_token(0) * (y - of_token(1) * row_sums) + bias
        value, out = y.astype(self.out.dtype), self.out.at[self.part]
        if self.residual_gmem is not None:
            plgpu.barrier_wait(self.residual_loaded.at[self.part])
            value += plgpu.load(out.T, layout=LAYOUT, optimized=False)
            plgpu.commit_smem()  # all have read it before it is overwritten
        if self.out.dtype.itemsize == 4:  # what has fewer bytes is transposed on the way
            value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out.T[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, self.out_gmem.at[pl.ds(first_token, width), pl.ds(first_row, ROWS)])
