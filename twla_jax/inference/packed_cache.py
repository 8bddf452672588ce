"""Holds the key/value cache of a packed decoder, and the scratch memory of its kernels beside it."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int32

from twla_jax.ops.attention.kv_cache import KVCache, LayerKV


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelScratch:
    """Memory through which the blocks of one layer's kernels pass numbers to each other.

    Each is None where that layer's ops are not one kernel. The words have no meaning between calls, but for their tags
    (see `ops.hopper.tags`): what a call returns goes into the next one.

    Attributes:
      qkv: of `ops.qkv_attention`.
      pair: of `ops.linear_pair`.
    """

    qkv: Int32[Array, "1 all_heads_d"] | None = None
    pair: Int32[Array, "1 words"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedLayer(LayerKV):
    """One layer's entries, and its kernels' scratch memory."""

    scratch: KernelScratch = KernelScratch()

    def with_scratch(self, **words: Any) -> "PackedLayer":
        """Return the layer with these fields of its scratch memory replaced."""
        return dataclasses.replace(self, scratch=dataclasses.replace(self.scratch, **words))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedCache(KVCache):
    """A `KVCache` with a tuple of layers, and their kernels' scratch memory beside it."""

    scratch: tuple[KernelScratch, ...]

    def layer(self, index: int) -> PackedLayer:
        """Return the entries of one layer, with its scratch memory."""
        layer = super().layer(index)
        return PackedLayer(entries=layer.entries, scales=layer.scales, scratch=self.scratch[index])

    def with_layer(self, index: int, layer: LayerKV) -> "PackedCache":
        """Return the cache with other entries, and scratch memory, in one layer."""
        scratch = self.scratch
        if isinstance(layer, PackedLayer):
            scratch = (*scratch[:index], layer.scratch, *scratch[index + 1 :])
        layers = super().with_layer(index, layer.stores).layers
        return dataclasses.replace(self, layers=layers, scratch=scratch)
