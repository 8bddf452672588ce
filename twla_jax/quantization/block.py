"""Quantises one block, input by input, as the residual stream passes through it."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from twla_jax import hosts
from twla_jax.core import quantizers
from twla_jax.core.activation import OFF, ActivationQuantizer
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.settings import QuantizationSettings
from twla_jax.models import sharding
from twla_jax.models.blocks import ChainBlock, Context, Site, State
from twla_jax.models.layers import Linear, replace
from twla_jax.quantization.advance import advance, advance_reference, finish_block, kept_before, leaves
from twla_jax.quantization.experts import ExpertMoments, quantize_experts
from twla_jax.quantization.site import quantize_site
from twla_jax.quantization.stream import ResidualStream


def quantize_block(
    block: ChainBlock,
    rotations: Mapping[str, KroneckerRotation],
    stream: ResidualStream,
    reference: ResidualStream | None,
    context: Context,
    settings: QuantizationSettings,
) -> dict[str, jax.Array]:
    """Quantise one block, input by input, and move the stream past it.

    Args:
      block: full precision; stays as it is.
      rotations: by site; those that lack one are not rotated.
      stream: of the quantised model; is moved.
      reference: of the full-precision model, which moves with it, where errors of earlier layers are made up for.
      context: of this block's layer.
      settings: its `weights` and `activations` are read.

    Returns:
      `q.kernel.codes`, `q.kernel.alpha`, … for every linear, and for every input its clips and figures.
    """
    result = {}
    stride = max(1, stream.tokens // settings.activations.clip_tokens)
    original = block
    for index, site in enumerate(block.sites):
        linears = block.linears(site)
        moment, samples = stream.everywhere(_no_moment(site, linears)), []
        error_moment = stream.everywhere(_no_moment(site, linears)) if reference else None
        lack = stream.everywhere(_no_lack(linears)) if settings.weights.stream and block.adds(site) else None
        spans = {"first": kept_before(block, index), "last": index}
        pairs = zip(stream.batches(), reference.batches(), strict=True) if reference else None
        for batch, exact in pairs or ((batch, None) for batch in stream.batches()):
            x, inner, moment, sample, h = advance(
                block,
                *leaves(batch.state),
                batch.real,
                moment,
                context,
                **spans,
                stride=stride,
                keep=exact is not None,
            )
            batch.state = State(x, inner)
            samples.append(sample)
            if exact is not None:
                x, inner, error_moment, lack = advance_reference(
                    original, *leaves(exact.state), h, batch.real, error_moment, lack, context, **spans
                )
                exact.state = State(x, inner)
            del h  # all of an input, in the way of the next one
        kernels = tuple(linear.kernel.get_value() for linear in linears)
        rotation, sample = rotations.get(site.name), jnp.concatenate(samples)
        samples.clear()
        if isinstance(moment, ExpertMoments):
            tensors, clips, figures = quantize_experts(
                kernels, rotation, moment, sample, error_moment, settings=settings
            )
        else:
            tensors, clips, figures = quantize_site(
                kernels, rotation, moment, sample, stream.tokens, error_moment, lack, settings=settings
            )
        for name, tensor in zip(site.linears, tensors, strict=True):
            result |= {f"{name}.kernel.{part}": array for part, array in quantizers.arrays(tensor).items()}
        kernels = {f"{name}.kernel": tensor for name, tensor in zip(site.linears, tensors, strict=True)}
        inputs = input_changes(site, rotations.get(site.name), clips, settings.activations.bits)
        block = replace(block, kernels | inputs)
        if stream.mesh is not None:  # as the forward pass has them, whose windows are over `data`
            block = hosts.put(block, sharding.shardings(block, stream.mesh))
        result |= {f"{site.name}.clips": clips}
        result |= {f"{site.name}.{key}": value for key, value in figures.items()}
    finish_block(block, stream, context)
    if reference:
        finish_block(original, reference, context)
    return result


def input_changes(
    site: Site,
    rotation: KroneckerRotation | None,
    clips: Float[Array, "*layers 4"] | Float[np.ndarray, "*layers 4"],
    bits: int,
) -> dict[str, Any]:
    """Return what `replace` takes to give an input of a block its rotation and its quantiser."""
    settings = jnp.full_like(clips[..., 0], bits, jnp.int32)  # where the clips lie
    quantizer = ActivationQuantizer(bits=settings, clips=cast(jax.Array, clips), enabled=bits < OFF)
    changes: dict[str, Any] = {f"{site.name}_input.activation": quantizer}
    if rotation is not None:
        changes[f"{site.name}_input.rotation"] = rotation
    return changes


def _no_moment(site: Site, linears: tuple[Linear, ...]) -> Float[Array, "m m"] | ExpertMoments:
    """Return the second moments of no token at the input of a site."""
    m, _ = linears[0].features
    if site.experts:
        return ExpertMoments.zeros(linears[0].kernel.get_value().shape[0], m)
    return jnp.zeros((m, m), jnp.float32)


def _no_lack(linears: tuple[Linear, ...]) -> Float[Array, "n m"]:
    """Return what the stream lacks over no token, beside the input of the one linear that is added to it."""
    m, n = linears[0].features
    return jnp.zeros((n, m), jnp.float32)
