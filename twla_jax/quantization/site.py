"""Quantises the linears that share one input, in steps: what a step is done with is given up before the next one.

The second moments of a wide input are the largest arrays of a quantisation: no two copies live on without need.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Num

from twla_jax.core import gptq, grouped, kotms
from twla_jax.core.activation import fit_clips
from twla_jax.core.factors import Factors, factor_groups
from twla_jax.core.grouped_tensor import GroupedTensor
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.settings import GroupedSettings, QuantizationSettings, WeightSettings
from twla_jax.core.tensors import dequantize

# The tensor of each linear, all their weights as quantised, and figures by name.
Quantized = tuple[tuple[Any, ...], Float[Array, "n m"], dict[str, Float[Array, ""]]]


def quantize_site(
    kernels: tuple[Float[Array, "m n"], ...],
    rotation: KroneckerRotation | None,
    moment: Float[Array, "m m"],
    sample: Float[Array, "c m"],
    tokens: int,
    error_moment: Float[Array, "m m"] | None = None,
    lack: Float[Array, "n m"] | None = None,
    *,
    settings: QuantizationSettings,
) -> tuple[tuple[Any, ...], Float[Array, " 4"], dict[str, Float[Array, ""]]]:
    """Rotate and quantise the linears that share one input, and fit that input's clips to the result.

    Args:
      kernels: of the linears.
      rotation: of their input, if it is rotated.
      moment: second moments of the input, before rotation; is donated.
      sample: some of its tokens, before rotation; is donated.
      tokens: how many the moments are of.
      error_moment: `Σ (h₀ − h)ᵀ h` of the full-precision input h₀, where propagated errors are made up for; is donated.
      lack: `Σ (x₀ − x)ᵀ h` of the residual streams that the linears are added to, where they are; is donated.
      settings: its `weights` and `activations` are read.

    Returns:
      The packed tensor of each linear, the input's clips, and figures by name.
    """
    published = isinstance(settings.weights.quantizer, GroupedSettings)
    rows, sample = rotated_rows(kernels, rotation, sample, over=None if published else over_all(kernels))
    sizes = tuple(kernel.shape[1] for kernel in kernels)
    drift = None
    if error_moment is not None:
        error_moment = rotated_mean(error_moment, rotation, tokens)
        if lack is not None:
            lack = rotated_lack(lack, rotation, tokens)
        drift = output_drift(rows, error_moment, lack, settings=settings.weights)
        del error_moment, lack
    mean_moment = rotated_mean(moment, rotation, tokens)
    if published:
        tensors, dense, figures = in_published_groups(
            rows, mean_moment, sizes=sizes, settings=settings.weights
        )
    else:
        factors = factored(mean_moment, settings=settings.weights)
        tensors, dense, figures = swept(
            rows, mean_moment, factors, drift, sizes=sizes, settings=settings.weights
        )
        del factors
    del rows, mean_moment, drift
    return tensors, fitted_clips(dense, sample, candidates=settings.activations.clips), figures


def over_all(kernels: tuple[Float[Array, "m n"], ...]) -> NamedSharding | None:
    """Return the sharding of rows over every axis of the mesh that the kernels lie on; None if they do not divide.

    No row's sweep needs another's: so devices that hold the same weights, each with windows of its own, share them.
    """
    where, rows = getattr(kernels[0], "sharding", None), sum(kernel.shape[1] for kernel in kernels)
    if not isinstance(where, NamedSharding) or rows % where.mesh.size:
        return None
    return NamedSharding(where.mesh, PartitionSpec(where.mesh.axis_names[::-1]))


@functools.partial(jax.jit, donate_argnames="sample", static_argnames="over")
def rotated_rows(
    kernels: tuple[Float[Array, "m n"], ...],
    rotation: KroneckerRotation | None,
    sample: Float[Array, "c m"],
    *,
    over: NamedSharding | None = None,
) -> tuple[Float[Array, "n m"], Float[Array, "c m"]]:
    """Return the rows of all linears, float32, and the sample, both rotated; the rows split as `over` says."""
    rows = jnp.concatenate([kernel.astype(jnp.float32).T for kernel in kernels])
    rows = rows if over is None else jax.lax.with_sharding_constraint(rows, over)
    if rotation is None:
        return rows, sample
    left, right = rotation.left.astype(jnp.float32), rotation.right.astype(jnp.float32)
    return kotms.rotate(rows, left, right), kotms.rotate(sample, left, right)


@functools.partial(jax.jit, donate_argnames="moment")
def rotated_mean(
    moment: Float[Array, "m m"], rotation: KroneckerRotation | None, tokens: int | Num[Array, ""]
) -> Float[Array, "m m"]:
    """Return the moments of the rotated input, a token."""
    return (moment if rotation is None else kotms.rotate_moment(moment, rotation)) / tokens


@functools.partial(jax.jit, donate_argnames="lack")
def rotated_lack(
    lack: Float[Array, "n m"], rotation: KroneckerRotation | None, tokens: int
) -> Float[Array, "n m"]:
    """Return what the stream lacks against the rotated input, a token."""
    if rotation is not None:
        left, right = rotation.left.astype(jnp.float32), rotation.right.astype(jnp.float32)
        lack = kotms.rotate(lack, left, right)
    return lack / tokens


output_drift = jax.jit(gptq.output_drift, static_argnames="settings")
factored = jax.jit(factor_groups, static_argnames="settings")


@functools.partial(jax.jit, static_argnames=("sizes", "settings"))
def swept(
    rows: Float[Array, "n m"],
    mean_moment: Float[Array, "m m"],
    factors: Factors,
    drift: Float[Array, "n padded"] | None,
    *,
    sizes: tuple[int, ...],
    settings: WeightSettings,
) -> Quantized:
    """Return the tensor of each linear, of `sizes` rows, their weights as quantised, and figures."""
    tensor, figures = gptq.sweep_columns(rows, mean_moment, factors, drift, settings)
    ends = np.cumsum(sizes)[:-1]
    parts = zip(*(jnp.split(leaf, ends) for leaf in jax.tree.leaves(tensor)), strict=True)
    tensors = tuple(jax.tree.unflatten(jax.tree.structure(tensor), leaves) for leaves in parts)
    return tensors, dequantize(tensor), figures


@functools.partial(jax.jit, static_argnames=("sizes", "settings"))
def in_published_groups(
    rows: Float[Array, "n m"],
    mean_moment: Float[Array, "m m"],
    *,
    sizes: tuple[int, ...],
    settings: WeightSettings,
) -> Quantized:
    """Return what `swept` does, of the published layout; a matrix has groups of its own there."""
    assert settings.compensation is not None  # which the settings refuse
    damping = settings.compensation.damping
    matrices = jnp.split(rows, np.cumsum(sizes)[:-1])
    found = [grouped.quantize_in_groups(each, mean_moment, 1, damping=damping) for each in matrices]
    tensors: tuple[GroupedTensor, ...] = tuple(tensor for tensor, _ in found)
    dense = jnp.concatenate([tensor.dequantize() for tensor in tensors])
    figures = gptq.output_figures(rows, rows - dense, mean_moment)
    return tensors, dense, figures | {"damping": found[0][1]["damping"]}


@functools.partial(jax.jit, static_argnames="candidates")
def fitted_clips(
    dense: Float[Array, "n m"], sample: Float[Array, "c m"], *, candidates: tuple[float, ...]
) -> Float[Array, " 4"]:
    """Return the clips of an input that cost the least at the outputs of its quantised linears."""
    output_metric = jnp.matmul(dense.T, dense, precision=jax.lax.Precision.HIGHEST)
    return fit_clips(sample, output_metric, candidates)
