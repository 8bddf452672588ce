"""Computes grouped-query attention in XLA, over keys and values stored heads first, with a float32 softmax."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from twla_jax.ops.attention.kv_cache import LayerKV, dequantize

_QUERY_CHUNK = 256  # queries whose scores against all keys exist at the same time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Positions:
    """Holds the positions of queries and keys, and the rotary angles of the queries (those of new keys, too).

    Queries and angles have a leading axis where every row of the batch is at positions of its own.
    """

    __no_type_check__: ClassVar[bool] = True  # a pytree may hold shardings or shapes in place of its arrays

    query: Int32[Array, "*b t"]
    key: Int32[Array, " s"]
    cos: Float[Array, "*b t half"]
    sin: Float[Array, "*b t half"]

    @property
    def tokens(self) -> int:
        """Return the number of queries of a row."""
        return self.query.shape[-1]

    @property
    def start(self) -> Int32[Array, "*b"]:
        """Return the position of the first query: of all rows, or of each."""
        return self.query[..., 0]


def attention(
    q: Float[Array, "b t heads d"],
    kv: LayerKV,
    positions: Positions,
    window: Int32[Array, ""],
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "b t heads_d"]:
    """Return every query's mix of the values at or before it, no further back than `window`, in `q.dtype`.

    Args:
      q: queries of t positions.
      kv: keys and values, with scales where they are int8; of more rows than q has, the first are read.
      positions: of queries and keys.
      window: how far back a query sees, itself included.
      softcap: c of `c · tanh(scores / c)`, which keeps scores in `(−c, c)`; None leaves them.
      sinks: of each head, a score that has its part of the softmax and no value (arXiv 2309.17453); None for none.
    """
    kv = kv.first_rows(len(q))
    one_query = functools.partial(_one_query, softcap=softcap)
    if q.shape[1] == 1 and kv.scales is not None:
        operands = q, kv, positions, window, sinks
        products = functools.partial(_scaled_products, softcap=softcap)
        return jax.lax.platform_dependent(*operands, tpu=products, default=one_query)
    if q.shape[1] == 1 and q.shape[2] == kv.entries.shape[2]:
        return one_query(q, kv, positions, window, sinks)
    k, v = dequantize(kv, q.dtype)
    return _many_queries(q, k, v, positions, window, sinks, softcap=softcap)


def _one_query(
    q, kv: LayerKV, positions: Positions, window, sinks=None, *, softcap: float | None = None
) -> jax.Array:
    """Return one decode step as sums that XLA fuses with the reading of the cache, int8 or not.

    A matrix product would want int8 entries in another type first, written out and read again; and for a single query a
    key head, it has nothing to reuse.
    """
    b, _, heads, d = q.shape
    k, v = (kv.entries[i][:, :, None].astype(jnp.float32) for i in range(2))
    kv_heads = k.shape[1]
    # Without the barrier, XLA rotates the queries to their position again for every key.
    q = jax.lax.optimization_barrier(q)
    queries = q.reshape(b, kv_heads, heads // kv_heads, 1, d).astype(jnp.float32) * d**-0.5
    scores = (queries * k).sum(-1)
    if kv.scales is not None:
        scores = scores * kv.scales[0, :, :, None]
    visible = _visible(positions.query[..., None, None, :], positions.key, window)
    sinks = None if sinks is None else sinks.reshape(kv_heads, -1, 1)
    weights, total = _softmax(_capped(scores, softcap), visible, sinks)
    if kv.scales is not None:
        weights = weights * kv.scales[1, :, :, None]
    mixed = (weights[..., None] * v).sum(-2) / total
    return mixed.astype(q.dtype).reshape(b, 1, heads * d)


def _scaled_products(
    q, kv: LayerKV, positions: Positions, window, sinks=None, *, softcap: float | None = None
) -> jax.Array:
    """Return one decode step on int8 entries as matrix products: TPUs widen them on load, and sums take far longer."""
    k, v = kv.entries.astype(q.dtype)
    return _many_queries(q, k, v, positions, window, sinks, kv.scales, softcap)


def _many_queries(
    q, k, v, positions: Positions, window, sinks=None, scales=None, softcap: float | None = None
) -> jax.Array:
    """Return attention by matrix products, some queries at a time; `scales` belong to unscaled keys and values."""
    b, t, heads, d = q.shape
    kv_heads = k.shape[1]
    chunk = min(t, _QUERY_CHUNK)
    padding = -t % chunk
    # [chunks, b, kv, group, chunk, d]: a query group shares its key head's one matrix product.
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = q.reshape(b, -1, chunk, kv_heads, heads // kv_heads, d).transpose(1, 0, 3, 4, 2, 5)
    # [chunks, b or 1, 1, 1, chunk, 1], beside scores of [b, kv, group, chunk, s].
    query = jnp.atleast_2d(positions.query)
    query = jnp.pad(query, ((0, 0), (0, padding)), mode="edge").reshape(len(query), -1, chunk)
    query = query.swapaxes(0, 1)[:, :, None, None, :, None]
    sinks = None if sinks is None else sinks.reshape(kv_heads, -1, 1, 1)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    matmul = functools.partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)

    def attend_chunk(operands):
        q, query = operands
        scores = matmul(q.reshape(b, kv_heads, -1, d), k.swapaxes(2, 3)).reshape(*q.shape[:-1], -1)
        if scales is not None:
            scores *= scales[0][:, :, None, None]
        scores = _capped(scores * d**-0.5, softcap)
        weights, total = _softmax(scores, _visible(query, positions.key, window), sinks)
        if scales is not None:
            weights *= scales[1][:, :, None, None]
        flat = weights.reshape(b, kv_heads, -1, weights.shape[-1]).astype(v.dtype)
        return (matmul(flat, v).reshape(q.shape) / total).astype(q.dtype)

    mixed = jax.lax.map(attend_chunk, (q, query)) if t > chunk else attend_chunk((q[0], query[0]))[None]
    return mixed.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, heads * d)[:, :t]


def _capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _visible(query: jax.Array, key: jax.Array, window) -> jax.Array:
    distance = query - key
    return (distance >= 0) & (distance < window)


def _softmax(scores: jax.Array, visible: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the weights before they are divided by their total, and the total, in which sinks have their part."""
    scores = jnp.where(visible, scores, -jnp.inf)
    # Both results are in its units, so that no slope of their ratio passes through it.
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    if sinks is None:
        weights = jnp.exp(scores - largest)
        return weights, weights.sum(-1, keepdims=True)
    sinks = sinks.astype(scores.dtype)
    largest = jax.lax.stop_gradient(jnp.maximum(largest, sinks))
    weights = jnp.exp(scores - largest)
    return weights, weights.sum(-1, keepdims=True) + jnp.exp(sinks - largest)
