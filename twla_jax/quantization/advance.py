"""Moves the residual stream through a block, from the input of one site to that of another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from twla_jax.core import gptq
from twla_jax.models.blocks import ChainBlock, Context, State, run
from twla_jax.quantization.experts import ExpertMoments
from twla_jax.quantization.stream import ResidualStream

# All of an input, each token's experts, where the site has any, and the residual stream beside it.
_Input = tuple[Float[Array, "b s *k m"], Int32[Array, "b s k"] | None, Float[Array, "b s d"]]


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
    samples, spans = [], {"first": kept_before(block, index), "last": index}
    for batch in stream.batches():
        x, inner, _, sample, _ = advance(
            block, *leaves(batch.state), batch.real, None, context, **spans, stride=stride
        )
        batch.state = State(x, inner)
        samples.append(sample)
    return jnp.concatenate(samples)


def finish_block(
    block: ChainBlock, stream: ResidualStream, context: Context, first: int | None = None
) -> None:
    """Move the stream past the block, from site `first`; by default from the last one, which it has come to."""
    first = kept_before(block, len(block.sites)) if first is None else first
    for batch in stream.batches():
        batch.state = State(finish(block, *leaves(batch.state), context, first=first))


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
    _Input | None,
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
      The stream and inner state to go on from, the moments, a sample of the input, float32, and with `keep` all of it,
      each token's experts, where the site has any, and the stream beside it.
    """
    site, before = block.sites[last], State(x, inner)
    state = run(block, before, context, first, last)
    h = block.before(site, state, context)
    h = h * real.reshape(-1, *[1] * (h.ndim - 1)).astype(h.dtype)
    experts = block.route(state, context).experts if site.experts else None
    if h.ndim > 3:  # a row for each expert of a token; one more, lest all of the sample be of one rank
        stride = stride * h.shape[2] + 1
    sample = h.reshape(-1, h.shape[-1])[stride // 2 :: stride].astype(jnp.float32)
    if isinstance(moment, ExpertMoments):
        assert experts is not None
        moment = moment.add(h, h, experts, real)
    elif moment is not None:
        moment = gptq.accumulate_moment(moment, h)
    kept = before if site.recomputed else state
    return kept.x, kept.inner, moment, sample, (h, experts, state.x) if keep else None


@functools.partial(jax.jit, static_argnames=("first", "last"), donate_argnames=("x", "error_moment", "lack"))
def advance_reference(
    original: ChainBlock,
    x: Float[Array, "b s d"],
    inner: Float[Array, "b s _"] | None,
    quantized: _Input,
    real: Float[Array, " b"],
    error_moment: Float[Array, "m m"] | ExpertMoments,
    lack: Float[Array, "d m"] | None,
    context: Context,
    *,
    first: int,
    last: int,
) -> tuple[
    Float[Array, "b s d"],
    Float[Array, "b s _"] | None,
    Float[Array, "m m"] | ExpertMoments,
    Float[Array, "d m"] | None,
]:
    """Move the full-precision stream to the input of site `last`; add what h, its quantised twin, lacks to the moment.

    Where h is zero, as in windows that only fill up a batch, nothing is added. Of experts, inputs are compared of those
    that the quantised model chooses; what goes on in the stream is the original's own choice.

    Args:
      original: the block in full precision.
      x: its residual stream.
      inner: what site `first` reads instead of it, if it does.
      quantized: h, the same input in the quantised model, each token's experts, where the site has any, and the stream.
      real: 0 for windows that only fill up a batch.
      error_moment: `Σ (h₀ − h)ᵀ h` so far, of the full-precision input h₀.
      lack: `Σ (x₀ − x)ᵀ h` so far, of the full-precision stream x₀, where outputs are added to it; else None.
      context: of the block's layer.
      first: the site that the state has come to.
      last: the site whose input is looked at.

    Returns:
      The stream and inner state to go on from, and both sums.
    """
    site, before = original.sites[last], State(x, inner)
    h, experts, stream = quantized
    context = dataclasses.replace(context, experts=experts)
    state = run(original, before, context, first, last)
    exact = original.before(site, state, context)
    difference = exact.astype(jnp.float32) - h.astype(jnp.float32)
    kept = before if site.recomputed else state
    if isinstance(error_moment, ExpertMoments):
        assert experts is not None
        return kept.x, kept.inner, error_moment.add(difference, h, experts, real), lack
    h, difference = (each.reshape(-1, h.shape[-1]).astype(jnp.float32) for each in (h, difference))
    error_moment = error_moment + jnp.matmul(difference.T, h, precision=jax.lax.Precision.HIGHEST)
    if lack is not None:
        missing = state.x.astype(jnp.float32) - stream.astype(jnp.float32)
        missing = missing.reshape(-1, missing.shape[-1])
        lack = lack + jnp.matmul(missing.T, h, precision=jax.lax.Precision.HIGHEST)
    return kept.x, kept.inner, error_moment, lack


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


def kept_before(block: ChainBlock, index: int) -> int:
    """Return the site whose state the stream holds when it is to move on to site `index`."""
    return max((i for i in range(index) if not block.sites[i].recomputed), default=0)


def leaves(state: State) -> tuple[jax.Array, jax.Array | None]:
    """Return the stream and what the next site reads instead, apart: only the first is donated."""
    return state.x, state.inner
