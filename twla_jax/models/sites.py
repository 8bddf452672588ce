"""Names the activation sites of a decoder: what gets bits of its own, in execution order.

A site is a whole block (`block`, the paper) or each of the inputs of a block's linears (`input`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from twla_jax import hosts
from twla_jax.core.activation import OFF, ActivationQuantizer, with_bits
from twla_jax.errors import TwlaError
from twla_jax.limits import check_number
from twla_jax.models.blocks import ChainBlock
from twla_jax.models.decoder import Decoder
from twla_jax.models.layers import replace

SiteKind = Literal["block", "input"]
Weighting = Literal["elements", "macs"]


def site_spans(model: Decoder, kind: SiteKind) -> list[tuple[int, int]]:
    """Return, for each site of one block, the first of its inputs and the one after its last."""
    inputs = len(model.sites)
    return [(0, inputs)] if kind == "block" else [(i, i + 1) for i in range(inputs)]


def site_weights(model: Decoder, kind: SiteKind, weighting: Weighting) -> Int[np.ndarray, " l"]:
    """Return what one bit of each site counts for: elements of its inputs, or multiply-adds of their linears.

    Of experts, those count that a token goes to: each multiplies, and has an input of its own where no other reads it.
    """
    inputs = []
    for site in model.sites:
        features = [linear.features for linear in model.blocks.linears(site)]
        taken = model.config.experts_per_token if site.experts else 1
        elements = features[0][0] * (taken if site.writes else 1)
        macs = taken * features[0][0] * sum(n for _, n in features)
        inputs.append(elements if weighting == "elements" else macs)
    block = [sum(inputs[first:last]) for first, last in site_spans(model, kind)]
    return np.tile(np.asarray(block, np.int64), model.config.num_layers)


def work_shares(model: Decoder, seq_len: int) -> Float[np.ndarray, " inputs"]:
    """Return the share of a block's multiply-adds from each input to the next; attention counts to the first."""
    config = model.config
    work = site_weights(model, "input", "macs")[: len(model.sites)].astype(np.float64)
    work[0] += 2 * seq_len * config.num_heads * config.head_dim
    return work / work.sum()


def as_inputs(
    model: Decoder, bits: Int[np.ndarray, " l"], kind: SiteKind
) -> Int[np.ndarray, "layers inputs"]:
    """Return bits of the sites as bits of every block's inputs."""
    per_block = np.asarray(bits).reshape(-1, len(site_spans(model, kind)))
    return np.broadcast_to(per_block, (len(per_block), len(model.sites))) if kind == "block" else per_block


def input_bits(model: Decoder) -> Int[np.ndarray, "layers inputs"]:
    """Return the bits that every block's inputs have; 16 where they are off."""
    quantizers = _quantizers(model.blocks)
    columns = [np.asarray(q.bits) if q.enabled else np.full(q.bits.shape, OFF) for q in quantizers.values()]
    return np.stack(columns, axis=-1)


def with_input_bits(model: Decoder, bits: Int[np.ndarray, "layers inputs"]) -> Decoder:
    """Return the same quantised model with these bits; everything else is shared with it."""
    changes = {}
    for column, (path, quantizer) in enumerate(_quantizers(model.blocks).items()):
        changed = with_bits(quantizer, jnp.asarray(bits[:, column], dtype=jnp.int32))
        changes[f"blocks.{path}"] = dataclasses.replace(
            changed, bits=hosts.beside(changed.bits, quantizer.clips)
        )
    return replace(model, changes)


def input_clips(model: Decoder) -> dict[str, np.ndarray]:
    """Return the clips `[layers, 4]` of every input by its site's name, on the host."""
    quantizers = _quantizers(model.blocks).values()
    return {
        site.name: hosts.fetch(quantizer.clips)
        for site, quantizer in zip(model.sites, quantizers, strict=True)
    }


def with_input_clips(model: Decoder, clips: Mapping[str, Float[Array | np.ndarray, "layers 4"]]) -> Decoder:
    """Return the same quantised model with these clips; everything else is shared with it."""
    changes = {}
    for site, (path, quantizer) in zip(model.sites, _quantizers(model.blocks).items(), strict=True):
        fitted = jnp.asarray(clips[site.name], quantizer.clips.dtype)
        changes[f"blocks.{path}"] = dataclasses.replace(quantizer, clips=fitted)
    return replace(model, changes)


def with_site_bits(block: ChainBlock, span: tuple[int, int], bits: Int32[Array, ""]) -> ChainBlock:
    """Return one block with the inputs of one site, a span of `block.sites`, at `bits`, which may be traced."""
    quantizers = list(_quantizers(block).items())[slice(*span)]
    return replace(block, {path: with_bits(quantizer, bits) for path, quantizer in quantizers})


def require_quantizers(model: Decoder) -> None:
    """Refuse a model whose inputs have no fitted quantisers.

    Args:
      model: any decoder.

    Raises:
      TwlaError: it was not quantised.
    """
    if any(model.blocks.transform(site).activation is None for site in model.sites):
        raise TwlaError("activation bits need a quantised model; this one has full-precision weights")


def _quantizers(block: ChainBlock) -> dict[str, ActivationQuantizer]:
    """Return the quantiser of every input in a block, by its path."""
    found = {f"{site.name}_input.activation": block.transform(site).activation for site in block.sites}
    return {path: held.get_value() for path, held in found.items() if held is not None}


def set_activation_bits(model: Decoder, bits: int) -> Decoder:
    """Return the same quantised model with every linear input at `bits` and the clips for these.

    Args:
      model: quantised; stays as it is.
      bits: 2, 4, 6 or 8; 16 for off.

    Raises:
      TwlaError: `bits` are others, or the model was not quantised, so there are no clips to quantise its inputs with.
    """
    check_number("activation_bits", bits)

    def is_quantizer(leaf: object) -> bool:
        return isinstance(leaf, ActivationQuantizer)

    if bits != OFF and not any(map(is_quantizer, jax.tree.leaves(model, is_leaf=is_quantizer))):
        raise TwlaError("activation bits need a quantised model; this one has full-precision weights")
    return jax.tree.map(
        lambda leaf: with_bits(leaf, bits) if is_quantizer(leaf) else leaf, model, is_leaf=is_quantizer
    )
