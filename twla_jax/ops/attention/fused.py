"""Attends by cuDNN's kernels, which never write scores to memory: whole sequences, and chunks of a cached text."""

import functools
import importlib
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from twla_jax.ops.attention.kv_cache import LayerKV, dequantize
from twla_jax.ops.attention.reference import Positions

_log = logging.getLogger(__name__)
Implementation = Literal["cudnn", "xla"]


def fused_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t kv d"],
    v: Float[Array, "b t kv d"],
    *,
    implementation: Implementation = "cudnn",
) -> Float[Array, "b t heads_d"]:
    """Return `attention` of whole sequences without a window."""
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    return mixed.reshape(*q.shape[:2], -1)


def windowed_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t kv d"],
    v: Float[Array, "b t kv d"],
    reach: Int32[Array, ""],
    window: int,
    *,
    implementation: Implementation = "cudnn",
) -> Float[Array, "b t heads_d"]:
    """Return `attention` of whole sequences in a layer that reaches back `window` positions, or else over all.

    Args:
      q: queries.
      k: keys.
      v: values.
      reach: of this layer; a scan over layers has it as data.
      window: that of the layers that have one; static.
      implementation: `xla` computes it by plain products, on any device.
    """
    if q.shape[1] <= window:
        return fused_attention(q, k, v, implementation=implementation)
    attend = functools.partial(
        jax.nn.dot_product_attention, q, k, v, is_causal=True, implementation=implementation
    )
    mixed = jax.lax.cond(reach <= window, lambda: attend(local_window_size=(window - 1, 0)), attend)
    return mixed.reshape(*q.shape[:2], -1)


@functools.cache
def takes_windows(head_dim: int) -> bool:
    """Return whether cuDNN attends in windows by heads so wide, forwards and backwards, as plain products do.

    Which sizes it has kernels for depends on its version: a small case is tried.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((1, 256, 2, head_dim), (1, 256, 1, head_dim), (1, 256, 1, head_dim))
    inputs = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]

    def results(implementation: Implementation) -> list[np.ndarray]:
        def total(q, k, v, reach):
            mixed = windowed_attention(q, k, v, reach, 64, implementation=implementation)
            return (
                mixed.astype(jnp.float32) * jnp.arange(mixed.size).reshape(mixed.shape) / mixed.size
            ).sum()

        slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        found = [slope for reach in (64, 256) for slope in slopes(*inputs, jnp.int32(reach))]
        return [np.asarray(slope, np.float32) for slope in found]

    try:
        pairs = zip(results("cudnn"), results("xla"), strict=True)
        return all(np.abs(one - other).max() < 0.05 * np.abs(other).max() for one, other in pairs)
    except Exception as error:  # what cuDNN lacks shows in a dozen ways
        _log.info("cuDNN does not attend in windows by heads of %d: %s", head_dim, error)
        return False


def takes_chunks() -> bool:
    """Return whether this JAX has the function behind `jax.nn.dot_product_attention`, as `chunk_attention` needs it."""
    return _cudnn() is not None


def chunk_attention(
    q: Float[Array, "b t heads d"],
    kv: LayerKV,
    positions: Positions,
    *,
    implementation: Implementation = "cudnn",
) -> Float[Array, "b t heads_d"]:
    """Return `attention` of t tokens to themselves and to all before them in the cache, without a window.

    cuDNN's causal mask begins at the first key, and a mask given as numbers would have it read all of the cache. So it
    runs twice: over the chunk's own entries with that mask, and over as many entries as came before. The two mixes add
    up by their shares of the softmax, as in FlashAttention (arXiv 2205.14135, algorithm 1).

    Args:
      q: queries of t positions in a row, the same of every sequence.
      kv: keys and values, of which these tokens' are written already; of more rows than q has, the first are read.
      positions: of queries and keys.
      implementation: `xla` computes the two parts by plain products, on any device.
    """
    start, kv = positions.start, kv.first_rows(len(q))
    own = jax.tree.map(lambda store: jax.lax.dynamic_slice_in_dim(store, start, q.shape[1], 3), kv.stores)
    (own_k, own_v), (k, v) = (dequantize(each, q.dtype) for each in (own, kv))
    queries = q.swapaxes(1, 2)
    part = _cudnn_part if implementation == "cudnn" else _xla_part
    near, near_lse = part(queries, own_k, own_v, None)
    # No entries at all are nothing that a kernel must know of: of one, the result is left out.
    far, far_lse = part(queries, k, v, jnp.maximum(start, 1))
    far_lse = jnp.where(start > 0, far_lse, -jnp.inf)
    lse = jnp.logaddexp(near_lse, far_lse)
    near, far = (
        share[..., None] * mixed.astype(jnp.float32)
        for share, mixed in ((jnp.exp(near_lse - lse), near), (jnp.exp(far_lse - lse), far))
    )
    mixed = jnp.where(start > 0, near + far, near).astype(q.dtype)
    return mixed.swapaxes(1, 2).reshape(*q.shape[:2], -1)


def _cudnn() -> Any:
    """Return JAX's module of cuDNN attention; None where a later JAX has moved it.

    The public function rounds the logarithms of the softmax's sums to 16 bits, which shares cannot be made of, and
    takes heads after positions, for which the cache would be copied.
    """
    try:
        module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    except ImportError:
        return None
    return module if hasattr(module, "dot_product_attention") and hasattr(module, "MaskType") else None


def _cudnn_part(
    q: Float[Array, "b heads t d"],
    k: Float[Array, "b kv s d"],
    v: Float[Array, "b kv s d"],
    length: Int32[Array, ""] | None,
) -> tuple[Float[Array, "b heads t d"], Float32[Array, "b heads t"]]:
    """Return the mix and log-sum-exp of scores to the first `length` keys; None for a causal mask over all."""
    module = _cudnn()
    options: dict[str, Any] = {"mask_type": module.MaskType.CAUSAL}
    if length is not None:
        b, _, t, _ = q.shape
        options = {"mask_type": module.MaskType.PADDING}
        options |= {"q_seqlen": jnp.full(b, t, jnp.int32), "kv_seqlen": jnp.broadcast_to(length, b)}
    scale = q.shape[-1] ** -0.5
    mixed, lse = module.dot_product_attention(
        q, k, v, scale=scale, qkv_layout="BNTH", return_residual=True, **options
    )
    return mixed, lse.astype(jnp.float32)


def _xla_part(
    q: Float[Array, "b heads t d"],
    k: Float[Array, "b kv s d"],
    v: Float[Array, "b kv s d"],
    length: Int32[Array, ""] | None,
) -> tuple[Float[Array, "b heads t d"], Float32[Array, "b heads t"]]:
    """Return what `_cudnn_part` does, by plain products."""
    b, heads, t, d = q.shape
    grouped = q.reshape(b, k.shape[1], -1, t, d)
    scores = jnp.einsum("bkgtd,bksd->bkgts", grouped, k, preferred_element_type=jnp.float32) * d**-0.5
    key = jnp.arange(k.shape[2])
    visible = key <= jnp.arange(t)[:, None] if length is None else key < length
    scores = jnp.where(visible, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(v.dtype)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", weights, v, preferred_element_type=jnp.float32)
    return mixed.astype(q.dtype).reshape(q.shape), lse.reshape(b, heads, t)
