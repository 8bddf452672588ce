"""Activation sites of a decoder: what gets bits of its own, in execution order.

A site is a whole block (`block`, the paper) or each of a block's four inputs (`input`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Int32

from twla_jax.core.activation import OFF, ActivationQuantizer, with_bits
from twla_jax.errors import TwlaError
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import SITES, Block, Decoder

SiteKind = Literal["block", "input"]
Weighting = Literal["elements", "macs"]


def site_parts(kind: SiteKind) -> list[tuple[int, int]]:
    """For each site of one block, the first of `SITES` that belongs to it and the one after its last."""
    return [(0, len(SITES))] if kind == "block" else [(i, i + 1) for i in range(len(SITES))]


def site_weights(config: DecoderConfig, kind: SiteKind, weighting: Weighting) -> Int[np.ndarray, " l"]:
    """What one bit of each site counts for: elements of the inputs a token, or multiply-adds of their linears."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    d, hidden = config.hidden_size, config.intermediate_size
    elements = [d, heads, d, hidden]
    if weighting == "macs":
        elements = [d * (heads + 2 * kv_heads), heads * d, 2 * d * hidden, hidden * d]
    block = [sum(elements[first:last]) for first, last in site_parts(kind)]
    return np.tile(np.asarray(block, np.int64), config.num_layers)


def part_shares(config: DecoderConfig, seq_len: int) -> np.ndarray:
    """The share of a block's multiply-adds in each part, from one of `SITES` to the next; attention counts to `qkv`."""
    work = site_weights(config, "input", "macs")[: len(SITES)].astype(np.float64)
    work[0] += 2 * seq_len * config.num_heads * config.head_dim
    return work / work.sum()


def as_inputs(bits: Int[np.ndarray, " l"], kind: SiteKind) -> Int[np.ndarray, "layers 4"]:
    """Bits of the sites as bits of every block's inputs."""
    per_block = np.asarray(bits).reshape(-1, len(site_parts(kind)))
    return np.broadcast_to(per_block, (len(per_block), len(SITES))) if kind == "block" else per_block


def input_bits(model: Decoder) -> Int[np.ndarray, "layers 4"]:
    """The bits that every block's inputs have; 16 where they are off."""
    quantizers = _quantizers(model.blocks)
    columns = [np.asarray(q.bits) if q.enabled else np.full(q.bits.shape, OFF) for q in quantizers.values()]
    return np.stack(columns, axis=-1)


def with_input_bits(model: Decoder, bits: Int[np.ndarray, "layers 4"]) -> Decoder:
    """The same quantised model with these bits; everything else is shared with it."""
    changed = _shared(model)
    for column, (site, quantizer) in enumerate(_quantizers(model.blocks).items()):
        set_quantizer(
            changed.blocks, site, with_bits(quantizer, jnp.asarray(bits[:, column], dtype=jnp.int32))
        )
    return changed


def input_clips(model: Decoder) -> dict[str, np.ndarray]:
    """The clips `[layers, 4]` of every input, on the host."""
    return {site: np.asarray(quantizer.clips) for site, quantizer in _quantizers(model.blocks).items()}


def with_input_clips(model: Decoder, clips: Mapping[str, Any]) -> Decoder:
    """The same quantised model with these clips; everything else is shared with it."""
    changed = _shared(model)
    for site, quantizer in _quantizers(model.blocks).items():
        fitted = jnp.asarray(clips[site], quantizer.clips.dtype)
        set_quantizer(changed.blocks, site, dataclasses.replace(quantizer, clips=fitted))
    return changed


def with_site_bits(block: Block, parts: tuple[int, int], bits: Int32[Array, ""]) -> Block:
    """One block with the inputs of one site at `bits`, which may be traced."""
    changed = _shared(block)
    for site in list(SITES)[slice(*parts)]:
        set_quantizer(changed, site, with_bits(_quantizer(block, site), bits))
    return changed


def set_quantizer(block: Block, site: str, quantizer: ActivationQuantizer) -> None:
    """Puts a quantiser in front of the linears of `site`, in place."""
    getattr(block, f"{site}_input").activation = nnx.data(nnx.Param(quantizer))


def require_quantizers(model: Decoder) -> None:
    """Refuses a model whose inputs have no fitted quantisers.

    Raises:
      TwlaError: the model was not quantised.
    """
    if any(getattr(model.blocks, f"{site}_input").activation is None for site in SITES):
        raise TwlaError("activation bits need a quantised model; this one has full-precision weights")


def _quantizer(block: Block, site: str) -> ActivationQuantizer:
    return getattr(block, f"{site}_input").activation.get_value()


def _quantizers(block: Block) -> dict[str, ActivationQuantizer]:
    return {site: _quantizer(block, site) for site in SITES}


def _shared(module: Any) -> Any:
    """Another module with the same arrays, so that its parameters can be replaced."""
    return nnx.merge(*nnx.split(module))


def set_activation_bits(model: Decoder, bits: int) -> Decoder:
    """The same quantised model with every linear input at `bits` (2, 4, 6, 8; 16 for off) and the clips for these.

    Raises:
      TwlaError: the model was not quantised, so there are no clips to quantise its inputs with.
    """

    def is_quantizer(leaf):
        return isinstance(leaf, ActivationQuantizer)

    if bits != OFF and not any(map(is_quantizer, jax.tree.leaves(model, is_leaf=is_quantizer))):
        raise TwlaError("activation bits need a quantised model; this one has full-precision weights")
    return jax.tree.map(
        lambda leaf: with_bits(leaf, bits) if is_quantizer(leaf) else leaf, model, is_leaf=is_quantizer
    )
