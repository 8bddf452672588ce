"""Quantises one block, input by input, as the residual stream passes through it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from twla_jax.core import gptq, kotms, quantizers
from twla_jax.core.activation import OFF, ActivationQuantizer, fit_clips
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.settings import QuantizationSettings
from twla_jax.core.tensors import dequantize
from twla_jax.models.decoder import SITES, Block, Positions
from twla_jax.quantization.stream import ResidualStream


def sample_site(
    block: Block, stream: ResidualStream, reach: Int32[Array, ""], site: str, stride: int
) -> Float[Array, "c m"]:
    """Moves the stream up to the input of `site`; returns every `stride`-th token of that input, float32."""
    samples = []
    for batch, real in stream.batches():
        here = (stream.positions, reach)
        batch["x"], batch["mixed"], _, sample, _ = advance(
            block, batch["x"], batch["mixed"], real, None, *here, site=site, stride=stride
        )
        samples.append(sample)
    return jnp.concatenate(samples)


def quantize_block(
    block: Block,
    rotations: dict[str, KroneckerRotation],
    stream: ResidualStream,
    reference: ResidualStream | None,
    reach: Int32[Array, ""],
    settings: QuantizationSettings,
) -> dict[str, jax.Array]:
    """Quantises one block in place, input by input, and moves the stream past it.

    The `reference` is the stream of the full-precision model, which moves with it.

    Returns:
      `q.kernel.codes`, `q.kernel.alpha`, … for every linear, and for every input its clips and figures.
    """
    result = {}
    stride = max(1, stream.tokens // settings.activations.clip_tokens)
    original = nnx.merge(*nnx.split(block))
    for site, names in SITES.items():
        linears = [getattr(block, name) for name in names]
        m = linears[0].kernel.get_value().shape[0]
        moment, samples = jnp.zeros((m, m), jnp.float32), []
        drift = jnp.zeros((m, m), jnp.float32) if reference else None
        pairs = zip(stream.batches(), reference.batches(), strict=True) if reference else None
        for (batch, real), (exact, _) in pairs or ((batch, ({}, None)) for batch in stream.batches()):
            here, keep = (stream.positions, reach), reference is not None
            batch["x"], batch["mixed"], moment, sample, h = advance(
                block, batch["x"], batch["mixed"], real, moment, *here, site=site, stride=stride, keep=keep
            )
            samples.append(sample)
            if reference:
                exact["x"], exact["mixed"], drift = advance_reference(
                    original, exact["x"], exact["mixed"], h, drift, *here, site=site
                )
        kernels = tuple(linear.kernel.get_value() for linear in linears)
        tensors, clips, figures = _quantize_site(
            kernels,
            rotations.get(site),
            moment,
            jnp.concatenate(samples),
            stream.tokens,
            drift,
            settings=settings,
        )
        for name, linear, tensor in zip(names, linears, tensors, strict=True):
            linear.kernel = nnx.Param(tensor)
            result |= {f"{name}.kernel.{part}": array for part, array in quantizers.arrays(tensor).items()}
        set_input(getattr(block, f"{site}_input"), rotations.get(site), clips, settings.activations.bits)
        result |= {f"{site}.clips": clips} | {f"{site}.{key}": value for key, value in figures.items()}
    for batch, _ in stream.batches():
        batch["x"] = finish(block, batch["x"])
    for batch, _ in reference.batches() if reference else ():
        batch["x"] = finish(original, batch["x"])
    return result


def set_input(transform: Any, rotation: KroneckerRotation | None, clips: Any, bits: int) -> None:
    """Gives an input of a block its rotation and its quantiser."""
    if rotation is not None:
        transform.rotation = nnx.data(nnx.Param(rotation))
    settings = jnp.full(clips.shape[:-1], bits, jnp.int32)
    transform.activation = nnx.data(
        nnx.Param(ActivationQuantizer(bits=settings, clips=clips, enabled=bits < OFF))
    )


@functools.partial(jax.jit, static_argnames=("site", "stride", "keep"), donate_argnames=("x", "moment"))
def advance(
    block: Block,
    x: Float[Array, "b s d"],
    mixed: Any,
    real: Float[Array, " b"],
    moment: Float[Array, "m m"] | None,
    positions: Positions,
    reach: Int32[Array, ""],
    *,
    site: str,
    stride: int,
    keep: bool = False,
) -> tuple[
    Float[Array, "b s d"], Any, Float[Array, "m m"] | None, Float[Array, "c m"], Float[Array, "b s m"] | None
]:
    """One batch up to the input of `site`: the stream, that input's second moments, a sample and perhaps all of it.

    The sample is every so many tokens; all of them are returned with `keep`, else None.
    `mixed` is the attention's output between the sites o and mlp, `[b, s, heads_d]`, and None elsewhere. Windows that
    only fill up a batch (`real` is 0) give zeros, which count for nothing in moments or clips. Without a `moment` to
    add to, none is taken.
    """
    x, mixed, h = _to_site(block, x, mixed, positions, reach, site)
    h = h * real[:, None, None].astype(h.dtype)
    sample = h.reshape(-1, h.shape[-1])[stride // 2 :: stride].astype(jnp.float32)
    if moment is not None:
        moment = gptq.accumulate_moment(moment, h)
    return x, mixed, moment, sample, h if keep else None


@functools.partial(jax.jit, static_argnames="site", donate_argnames=("x", "drift"))
def advance_reference(
    original: Block,
    x: Float[Array, "b s d"],
    mixed: Any,
    h: Float[Array, "b s m"],
    drift: Float[Array, "m m"],
    positions: Positions,
    reach: Int32[Array, ""],
    *,
    site: str,
) -> tuple[Float[Array, "b s d"], Any, Float[Array, "m m"]]:
    """The full-precision stream up to the input of `site`, and what it adds to the drift from h, its quantised twin.

    Where h is zero, as in windows that only fill up a batch, nothing is added.
    """
    x, mixed, exact = _to_site(original, x, mixed, positions, reach, site)
    h = h.reshape(-1, h.shape[-1]).astype(jnp.float32)
    difference = exact.reshape(h.shape).astype(jnp.float32) - h
    return x, mixed, drift + jnp.matmul(difference.T, h, precision=jax.lax.Precision.HIGHEST)


def _to_site(block, x, mixed, positions, reach, site):
    if site == "qkv":
        h = block.input_norm(x)
    elif site == "o":
        h = mixed = block.attend(block.qkv_input(block.input_norm(x)), positions, reach)
    elif site == "mlp":
        x, mixed = x + block.o(block.o_input(mixed)), None
        h = block.post_norm(x)
    else:
        h = block.gate_up(block.mlp_input(block.post_norm(x)))
    return x, mixed, h


@functools.partial(jax.jit, donate_argnames="x")
def finish(block: Block, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """From the MLP's residual to the block's output."""
    h = block.gate_up(block.mlp_input(block.post_norm(x)))
    return x + block.down(block.down_input(h))


@functools.partial(jax.jit, static_argnames="settings")
def _quantize_site(
    kernels: tuple[Float[Array, "m n"], ...],
    rotation: KroneckerRotation | None,
    moment: Float[Array, "m m"],
    sample: Float[Array, "c m"],
    tokens: Float[Array, ""],
    drift: Float[Array, "m m"] | None = None,
    *,
    settings: QuantizationSettings,
) -> tuple[tuple[Any, ...], Float[Array, " 4"], dict[str, Float[Array, ""]]]:
    """Rotates and quantises the linears that share one input, and fits that input's clips to the result."""
    rows = jnp.concatenate([kernel.astype(jnp.float32).T for kernel in kernels])
    if rotation is not None:
        left, right = rotation.left.astype(jnp.float32), rotation.right.astype(jnp.float32)
        rows, sample = kotms.rotate(rows, left, right), kotms.rotate(sample, left, right)
        moment = kotms.rotate_moment(moment, rotation)
        drift = None if drift is None else kotms.rotate_moment(drift, rotation)
    tensor, figures = gptq.quantize_matrix(rows, moment, tokens, drift, settings=settings.weights)
    dense = dequantize(tensor)
    output_metric = jnp.matmul(dense.T, dense, precision=jax.lax.Precision.HIGHEST)
    clips = fit_clips(sample, output_metric, settings.activations.clips)
    ends = np.cumsum([kernel.shape[1] for kernel in kernels])
    tensors = tuple(
        jax.tree.map(lambda leaf, rows=slice(end - kernel.shape[1], end): leaf[rows], tensor)
        for end, kernel in zip(ends, kernels, strict=True)
    )
    return tensors, clips, figures
