"""Fits clips anew once the bits are chosen.

A clip is first fitted on tokens that earlier inputs left unquantised. Once those have their bits, each input is fitted
again, in execution order, on what reaches it then.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int32

from twla_jax.core import tensors
from twla_jax.core.activation import BIT_CHOICES, ActivationQuantizer, fit_clips
from twla_jax.core.kotms import KroneckerRotation
from twla_jax.core.tensors import IntegerTensor, TernaryTensor
from twla_jax.models import sharding
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace
from twla_jax.models.sites import with_input_clips
from twla_jax.progress import Bar
from twla_jax.quantization.advance import finish_block, sample_site
from twla_jax.quantization.stream import ResidualStream


def refit_clips(
    model: Decoder,
    windows: Int32[np.ndarray, "w s"],
    candidates: tuple[float, ...],
    tokens: int,
    *,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Decoder:
    """Return the same model with the clip of each input's present bits fitted again; the clips of other bits stay.

    Args:
      model: quantised; stays as it is.
      windows: calibration tokens.
      candidates: clips to try.
      tokens: of the windows that a clip is chosen on.
      mesh: with axes `data`, over which the windows are split, and `model`.
      progress: a bar with an estimate of the time left, on stderr.
    """
    stream = ResidualStream(model, windows, mesh)
    stream.start()
    stride = max(1, stream.tokens // tokens)
    clips: dict[str, list[jax.Array]] = {site.name: [] for site in model.sites}
    for index in Bar(range(model.config.num_layers), desc="clips", unit="block", disable=not progress):
        block = sharding.place(jax.tree.map(lambda leaf, i=index: leaf[i], model.blocks), mesh)
        context = stream.context.layer(index)
        for at, site in enumerate(block.sites):
            sample = sample_site(block, stream, context, at, stride)
            transform = block.transform(site)
            rotation, quantizer = transform.rotation, transform.activation.get_value()
            fitted = _refit(
                quantizer,
                None if rotation is None else rotation.get_value(),
                tuple(linear.kernel.get_value() for linear in block.linears(site)),
                sample,
                candidates=candidates,
            )
            changed = dataclasses.replace(quantizer, clips=fitted)
            block = replace(block, {f"{site.name}_input.activation": changed})
            clips[site.name].append(fitted)
        finish_block(block, stream, context)
    return with_input_clips(model, {site: jnp.stack(fitted) for site, fitted in clips.items()})


@functools.partial(jax.jit, static_argnames="candidates")
def _refit(
    quantizer: ActivationQuantizer,
    rotation: KroneckerRotation | None,
    kernels: tuple[TernaryTensor | IntegerTensor, ...],
    sample: Float[Array, "c m"],
    candidates: tuple[float, ...],
) -> Float16[Array, " 4"]:
    if rotation is not None:
        sample = rotation(sample)
    dense = (tensors.dequantize(kernel) for kernel in kernels)
    rows = jnp.concatenate(
        [each.reshape(-1, each.shape[-1]) for each in dense]
    )  # of all experts, if there are any
    metric = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
    chosen = jnp.asarray(BIT_CHOICES) == quantizer.bits
    return jnp.where(chosen, fit_clips(sample, metric, candidates), quantizer.clips)
