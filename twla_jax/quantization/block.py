"""Quantises one block, input by input, as the residual stream passes through it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from twla_jax.core import gptq, quantizers
from twla_jax.core.activation import OFF, ActivationQuantizer
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.settings import QuantizationSettings
from twla_jax.models.blocks import ChainBlock, Context, Site, State, run
from twla_jax.models.layers import Linear, replace
from twla_jax.quantization.experts import ExpertMoments, quantize_experts
from twla_jax.quantization.site import quantize_site
from twla_jax.quantization.stream import ResidualStream


def sample_site(
    block: ChainBlock, stream: ResidualStream, context: Context, index: int, stride: int
) -> Float[Array, "c m"]:
    """Move the stream up to the input of a site; return every `stride`-th token of that input, float32.

    Args:
      block: the one that the stream stands in; the sites before this one are as they should be.
      stream: is changed.
      context: of this block's layer.
      index: of the site, in `block.sites`.
      stride: so many tokens from one of the sample to the next.
    """
    samples, spans = [], {"first": _kept_before(block, index), "last": index}
    for batch in stream.batches():
        x, inner, _, sample, _ = advance(
            block, *_leaves(batch.state), batch.real, None, context, **spans, stride=stride
        )
        batch.state = State(x, inner)
        samples.append(sample)
    return jnp.concatenate(samples)


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
        spans = {"first": _kept_before(block, index), "last": index}
        pairs = zip(stream.batches(), reference.batches(), strict=True) if reference else None
        for batch, exact in pairs or ((batch, None) for batch in stream.batches()):
            x, inner, moment, sample, h = advance(
                block,
                *_leaves(batch.state),
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
                x, inner, error_moment = advance_reference(
                    original, *_leaves(exact.state), h, batch.real, error_moment, context, **spans
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
                kernels, rotation, moment, sample, stream.tokens, error_moment, settings=settings
            )
        for name, tensor in zip(site.linears, tensors, strict=True):
            result |= {f"{name}.kernel.{part}": array for part, array in quantizers.arrays(tensor).items()}
        kernels = {f"{name}.kernel": tensor for name, tensor in zip(site.linears, tensors, strict=True)}
        inputs = input_changes(site, rotations.get(site.name), clips, settings.activations.bits)
        block = replace(block, kernels | inputs)
        result |= {f"{site.name}.clips": clips}
        result |= {f"{site.name}.{key}": value for key, value in figures.items()}
    finish_block(block, stream, context)
    if reference:
        finish_block(original, reference, context)
    return result


def finish_block(
    block: ChainBlock, stream: ResidualStream, context: Context, first: int | None = None
) -> None:
    """Move the stream past the block, from site `first`; by default from the last one, which it has come to."""
    first = _kept_before(block, len(block.sites)) if first is None else first
    for batch in stream.batches():
        batch.state = State(finish(block, *_leaves(batch.state), context, first=first))


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


@functools.partial(
    jax.jit, static_argnames=("first", "last", "stride", "keep"), donate_argnames=("x", "moment")
)
def advance(
    block: ChainBlock,
    x: Float[Array, "b s d"],
    inner: Float[Array, "b s _"] | None,
    real: Float[Array, " b"],
    moment: Float[Array, "m m"] | ExpertMoments | None,
    context: Context,
    *,
    first: int,
    last: int,
    stride: int,
    keep: bool = False,
) -> tuple[
    Float[Array, "b s d"],
    Float[Array, "b s _"] | None,
    Float[Array, "m m"] | ExpertMoments | None,
    Float[Array, "c m"],
    tuple[Float[Array, "b s *k m"], Int32[Array, "b s k"] | None] | None,
]:
    """Move one batch from site `first` to the input of site `last`.

    Args:
      block: with the sites before `last` as they should be.
      x: the residual stream.
      inner: what site `first` reads instead of it, if it does.
      real: 0 for windows that only fill up a batch: they give zeros, which count for nothing in moments or clips.
      moment: second moments to add that input's to; None to take none.
      context: of the block's layer.
      first: the site that the state has come to.
      last: the site whose input is looked at.
      stride: so many tokens from one of the sample to the next.
      keep: whether all of the input is returned.

    Returns:
      The stream and inner state to go on from, the moments, a sample of the input, float32, and with `keep` all of it
      and each token's experts, where the site has any.
    """
    site, before = block.sites[last], State(x, inner)
    state = run(block, before, context, first, last)
    h = block.before(site, state, context)
    h = h * real.reshape(-1, *[1] * (h.ndim - 1)).astype(h.dtype)
    experts = block.route(state, context).experts if site.experts else None
    if (
        h.ndim > 3
    ):  # a row for each expert of a token; one more, so that not all of the sample are of one rank
        stride = stride * h.shape[2] + 1
    sample = h.reshape(-1, h.shape[-1])[stride // 2 :: stride].astype(jnp.float32)
    if isinstance(moment, ExpertMoments):
        assert experts is not None
        moment = moment.add(h, h, experts, real)
    elif moment is not None:
        moment = gptq.accumulate_moment(moment, h)
    kept = before if site.recomputed else state
    return kept.x, kept.inner, moment, sample, (h, experts) if keep else None


@functools.partial(jax.jit, static_argnames=("first", "last"), donate_argnames=("x", "error_moment"))
def advance_reference(
    original: ChainBlock,
    x: Float[Array, "b s d"],
    inner: Float[Array, "b s _"] | None,
    quantized: tuple[Float[Array, "b s *k m"], Int32[Array, "b s k"] | None],
    real: Float[Array, " b"],
    error_moment: Float[Array, "m m"] | ExpertMoments,
    context: Context,
    *,
    first: int,
    last: int,
) -> tuple[Float[Array, "b s d"], Float[Array, "b s _"] | None, Float[Array, "m m"] | ExpertMoments]:
    """Move the full-precision stream to the input of site `last`; add what h, its quantised twin, lacks to the moment.

    Where h is zero, as in windows that only fill up a batch, nothing is added. Of experts, inputs are compared of those
    that the quantised model chooses; what goes on in the stream is the original's own choice.

    Args:
      original: the block in full precision.
      x: its residual stream.
      inner: what site `first` reads instead of it, if it does.
      quantized: h, the same input in the quantised model, and each token's experts, where the site has any.
      real: 0 for windows that only fill up a batch.
      error_moment: `Σ (h₀ − h)ᵀ h` so far, of the full-precision input h₀.
      context: of the block's layer.
      first: the site that the state has come to.
      last: the site whose input is looked at.

    Returns:
      The stream and inner state to go on from, and the error_moment.
    """
    site, before = original.sites[last], State(x, inner)
    h, experts = quantized
    context = dataclasses.replace(context, experts=experts)
    state = run(original, before, context, first, last)
    exact = original.before(site, state, context)
    difference = exact.astype(jnp.float32) - h.astype(jnp.float32)
    kept = before if site.recomputed else state
    if isinstance(error_moment, ExpertMoments):
        assert experts is not None
        return kept.x, kept.inner, error_moment.add(difference, h, experts, real)
    h, difference = (each.reshape(-1, h.shape[-1]).astype(jnp.float32) for each in (h, difference))
    error_moment = error_moment + jnp.matmul(difference.T, h, precision=jax.lax.Precision.HIGHEST)
    return kept.x, kept.inner, error_moment


@functools.partial(jax.jit, static_argnames="first", donate_argnames="x")
def finish(
    block: ChainBlock,
    x: Float[Array, "b s d"],
    inner: Float[Array, "b s _"] | None,
    context: Context,
    *,
    first: int,
) -> Float[Array, "b s d"]:
    """Return the block's output from the state at site `first`."""
    return run(block, State(x, inner), context, first).x


def _no_moment(site: Site, linears: tuple[Linear, ...]) -> Float[Array, "m m"] | ExpertMoments:
    """Return the second moments of no token at the input of a site."""
    m, _ = linears[0].features
    if site.experts:
        return ExpertMoments.zeros(linears[0].kernel.get_value().shape[0], m)
    return jnp.zeros((m, m), jnp.float32)


def _kept_before(block: ChainBlock, index: int) -> int:
    """Return the site whose state the stream holds when it is to move on to site `index`."""
    return max((i for i in range(index) if not block.sites[i].recomputed), default=0)


def _leaves(state: State) -> tuple[jax.Array, jax.Array | None]:
    """Return the stream and what the next site reads instead, apart: only the first is donated."""
    return state.x, state.inner
