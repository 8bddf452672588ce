"""Computes a quantised linear in one kernel on Hopper GPUs (Pallas Mosaic GPU), for one to four tokens.

One multiprocessor waits longer for a token's rotation than it computes it, and a kernel of its own takes as long again
to start. So every block computes the rotation for itself while its weights are loaded: see `ternary_matmul.gpu_ring`.
"""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from twla_jax.ops.attention.splits import AttentionSplits
from twla_jax.ops.hopper import threads
from twla_jax.ops.quantized_linear import gpu_linear
from twla_jax.ops.rotate_quantize import gpu_rotation
from twla_jax.ops.rotate_quantize.rotation import KernelRotation
from twla_jax.ops.ternary_matmul import gpu_ring
from twla_jax.ops.ternary_matmul.gpu_rows import Rows
from twla_jax.ops.ternary_matmul.ring_tiles import RingTileConfig
from twla_jax.ops.ternary_matmul.weight import KernelWeight


def quantized_linear(
    x: Float[Array, "t m"] | AttentionSplits,
    rotation: KernelRotation,
    settings: Float32[Array, " 3"] | None,
    weight: KernelWeight,
    norm_scale: Float[Array, " m"] | None,
    residual: Float[Array, "t n"] | None,
    *,
    epsilon: float,
    out_dtype,
    gated: bool = False,
    config: RingTileConfig | None = None,
) -> Float[Array, "t n"]:
    """Return what `reference.quantized_linear` computes, for one to `MOST_TOKENS` tokens in bf16."""
    inputs = (x.mixed, x.softmax) if isinstance(x, AttentionSplits) else (x,)
    t = len(inputs[0])
    wide = settings is None
    rows, chosen = gpu_linear.launch_plan(x, rotation, weight, gated=gated, wide=wide)
    if config is not None:
        rows, chosen = Rows(config.rows, rows.matrices), config
    groups = chosen.warpgroups
    shape = gpu_rotation.token_shape(x, rotation, groups, wide=wide)
    n = weight.out_features // rows.matrices
    norm = () if norm_scale is None else (threads.readable(norm_scale),)
    added = () if residual is None else (threads.readable(residual),)
    return plgpu.kernel(
        functools.partial(
            _kernel,
            rows=rows,
            config=chosen,
            shape=shape,
            weight=weight,
            epsilon=epsilon if norm else None,
        ),
        out_type=jax.ShapeDtypeStruct((t, n), out_dtype),
        grid=(gpu_ring.block_count(n, rows),),
        grid_names=("rows",),
        num_threads=groups,
        thread_name="warpgroup",
        kernel_name="quantized_linear",
        scratch_types=gpu_linear.scratch_types(rows, chosen, shape, weight),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*gpu_linear.global_operands(inputs, rotation, settings, weight, norm), *added)


def _kernel(*refs, **options):
    """Run both stages of one linear, one after the other."""
    *given, out_gmem = refs
    start_prefetch, finish_outputs = gpu_linear.linear_stages(
        *given, outputs=gpu_ring.RingOutputs(stored=out_gmem), **options
    )
    start_prefetch()
    finish_outputs()
