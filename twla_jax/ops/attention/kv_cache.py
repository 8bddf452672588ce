"""Defines the key/value cache, in the model's dtype or in int8 with a scale for every token and head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32, Int8, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKV:
    """Holds the keys and values of one layer, stacked; heads come before positions, as attention reads them.

    All layers of a model together have a leading axis. int8 entries stand for `scale · entry`; float entries have no
    scales.
    """

    entries: Float[Array, "*layers 2 b kv s d"] | Int8[Array, "*layers 2 b kv s d"]
    scales: Float32[Array, "*layers 2 b kv s"] | None = None

    @property
    def stores(self) -> "LayerKV":
        """Return a `LayerKV` of the entries and their scales alone, without what a subclass adds."""
        return LayerKV(entries=self.entries, scales=self.scales)

    def first_rows(self, count: int) -> "LayerKV":
        """Return the entries of the first rows of the batch; the same object if it has no more."""
        if self.entries.shape[1] == count:
            return self
        return LayerKV(
            entries=self.entries[:, :count], scales=None if self.scales is None else self.scales[:, :count]
        )

    def with_stores(self, stores: "LayerKV") -> "LayerKV":
        """Return the same object with the entries and scales of `stores`."""
        return dataclasses.replace(self, entries=stores.entries, scales=stores.scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Holds the keys and values of every layer so far, and how many positions are filled.

    `layers` is one stack for a model that scans over its blocks, and a tuple for one that runs them one by one: a slice
    of a stack would be copied before it is read. `length` is that of all rows, or has an entry for each.
    """

    layers: LayerKV | tuple[LayerKV, ...]
    length: Int32[Array, "*b"]

    @property
    def size(self) -> int:
        """Return the number of positions that there is room for."""
        return jax.tree.leaves(self.layers)[0].shape[-2]

    def layer(self, index: Any) -> LayerKV:
        """Return the entries of layer `index`."""
        if isinstance(self.layers, tuple):
            return self.layers[index]
        return jax.tree.map(lambda leaf: leaf[index], self.layers)

    def with_layer(self, index: Any, layer: LayerKV) -> "KVCache":
        """Return the cache with `layer` as layer `index`, updated in place where it was donated."""
        if isinstance(self.layers, tuple):
            layers = (*self.layers[:index], layer, *self.layers[index + 1 :])
        else:
            layers = jax.tree.map(lambda stack, leaf: stack.at[index].set(leaf), self.layers, layer)
        return dataclasses.replace(self, layers=layers)


def empty_layer(shape: tuple[int, ...], dtype) -> LayerKV:
    """Return a layer of zeros.

    Args:
      shape: `[*layers, 2, b, kv, s, d]`.
      dtype: a float type, or int8.
    """
    scales = jnp.zeros(shape[:-1]) if jnp.issubdtype(dtype, jnp.integer) else None
    return LayerKV(entries=jnp.zeros(shape, dtype), scales=scales)


def write(
    layer: LayerKV, k: Float[Array, "b t kv d"], v: Float[Array, "b t kv d"], position: Int32[Array, "*b"]
) -> LayerKV:
    """Return the layer with the keys and values of `t` tokens written from `position` on, quantised if it is int8.

    The position is that of all rows, or has an entry for each. A layer of more rows keeps the others.
    """
    entries, scales = jnp.stack([k, v]).swapaxes(2, 3), None
    if layer.scales is not None:
        entries, scales = _quantize(entries)
    new = LayerKV(entries=entries.astype(layer.entries.dtype), scales=scales)

    def put(store, entry):
        if position.ndim:
            store = _put_rows(store, entry, position)
        else:
            store = jax.lax.dynamic_update_slice(store, entry, (0, 0, 0, position, 0)[: store.ndim])
        return jax.lax.platform_dependent(
            store, cuda=_row_major, tpu=_without_padding, default=lambda store: store
        )

    return layer.with_stores(jax.tree.map(put, layer.stores, new))


def _put_rows(store: jax.Array, entry: jax.Array, position: Int32[Array, " b"]) -> jax.Array:
    """Return the store with the entries of each row from that row's position on; what lies outside is left out."""
    rows, positions = jnp.arange(len(position))[:, None], position[:, None] + jnp.arange(entry.shape[3])
    # Indexed axes come first where a slice lies between them.
    return store.at[:, rows, :, positions].set(jnp.moveaxis(entry, (1, 3), (0, 1)), mode="drop")


def dequantize(layer: LayerKV, dtype) -> Float[Array, "2 b kv s d"]:
    """Return the keys and values of one layer as floats in `dtype`."""
    if layer.scales is None:
        return layer.entries.astype(dtype)
    return (layer.entries * layer.scales[..., None]).astype(dtype)


# Without a constraint, XLA lays some layers out in another order within its loop, and copies them in and out.
def _row_major(store: jax.Array) -> jax.Array:
    return with_layout_constraint(store, Layout(tuple(range(store.ndim))))


def _without_padding(store: jax.Array) -> jax.Array:
    """Constrain the layout to what TPUs use: positions last, where features would be padded to 128."""
    order = list(range(store.ndim))
    if store.ndim == 5 and store.shape[-1] % 128:
        order[-2:] = order[-1], order[-2]
    return with_layout_constraint(store, Layout(tuple(order)))


def _quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return int8 codes and their float32 scale over the last axis, symmetric about zero."""
    values = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(values).max(-1), 1e-8) / 127
    return jnp.round(values / scale[..., None]).astype(jnp.int8), scale
