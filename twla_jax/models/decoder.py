"""Defines the decoder: embedding, blocks of the configuration's family, final norm and head.

All blocks are one `ChainBlock` whose arrays have a leading axis of layers, run by a scan: compilation and the memory
for unpacked weights are those of a single block. Weights may be arrays or `TernaryTensor`s, and each input of a block's
linears may be rotated and quantised.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int32

from twla_jax.core.quantizers import PackedTensor
from twla_jax.core.tensors import dequantize, take_rows
from twla_jax.devices import compute_capability
from twla_jax.models.arguments import checked_values
from twla_jax.models.blocks import ChainBlock, Context, Site
from twla_jax.models.config import DecoderConfig
from twla_jax.models.families import family_of
from twla_jax.models.layers import Linear, RMSNorm, precision, replace
from twla_jax.models.rope import angles, rotary_kinds
from twla_jax.ops.attention import fused as fused_attention
from twla_jax.ops.attention.kv_cache import KVCache, LayerKV, empty_layer
from twla_jax.ops.attention.reference import Positions

_LOGIT_ROWS = 8  # instead of a single one


class Decoder(nnx.Module):
    """The language model. A pytree: it goes through `jax.jit`, `jax.device_put` and `jax.tree.map` as it is.

    Attributes:
      dtype: what it computes in; weights are cast to it where they are used, while norms, softmax and logits stay
        float32. `computing_in` gives a model another.
      fused: whether attention of many tokens is cuDNN's, as it is with `computing_in(fused=True)`, and on a GPU after
        `prepare_for_inference`.
    """

    blocks: ChainBlock

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        """Make random weights in `param_dtype`; `nnx.eval_shape` of this is the abstract model that readers fill."""
        self.config = config
        self.dtype, self.fused = jnp.dtype(dtype), False
        embed = jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), param_dtype)
        self.embed = nnx.Param(embed * 0.02)
        block: Any = family_of(config).block  # every block is made with these arguments
        self.blocks = block(config, leading=(config.num_layers,), rngs=rngs, dtype=param_dtype)
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, leading=(), dtype=param_dtype)
        self.head = (
            None
            if config.tie_word_embeddings
            else Linear(
                config.hidden_size, config.vocab_size, bias=False, leading=(), rngs=rngs, dtype=param_dtype
            )
        )

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Return logits of the next token at every position, `[b, t, vocab]` float32.

        Inside `jax.jit` and other transformations token ids have no values yet, and cannot be refused: an id outside
        the vocabulary makes logits of its row NaN, at its position and after it at least.

        Raises:
          TwlaError: ids that are no integers `[b, t]`, or outside the vocabulary.
        """
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Return the last block's output after the final norm, `[b, t, d]` in `dtype`; ids as `__call__` takes them."""
        tokens = checked_values(tokens, self.config)

        def step(x: jax.Array, block: ChainBlock, context: Context, index: jax.Array | int) -> jax.Array:
            return _apply_block(block, x, context)

        context = self.context(tokens.shape[1])
        return self.last_norm(self.through_blocks(step, self.embed_tokens(tokens), context))

    def decode(
        self, tokens: Int[Array, "b t"], cache: KVCache, *, until: Int32[Array, ""] | None = None
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """Return `hidden` for tokens that follow those in the cache, and the cache with them added.

        The caller sees to it that `cache.length + t` stays within the cache. Entries past `length` are never read. A
        cache with a length for each row may have room for more rows than there are tokens of; the first are used.

        Args:
          tokens: ids of the next tokens.
          cache: keys and values of those before.
          until: positions of the whole text, where these tokens are a part of it: LongRoPE chooses by them; those up to
            the last of `tokens` if None.
        """
        tokens = checked_values(tokens, self.config)
        context = self.context(tokens.shape[1], start=cache.length, keys=cache.size, until=until)

        def step(
            carry: tuple[jax.Array, KVCache], block: ChainBlock, context: Context, index: jax.Array | int
        ) -> tuple[jax.Array, KVCache]:
            x, cache = carry
            x, entries = _decode_block(block, x, cache.layer(index), context)
            # The whole cache is carried, not scanned over, so that a donated one is updated in place.
            return x, cache.with_layer(index, entries)

        x, cache = self.through_blocks(step, (self.embed_tokens(tokens), cache), context)
        return self.last_norm(x), dataclasses.replace(cache, length=cache.length + tokens.shape[1])

    def through_blocks[T](
        self,
        step: Callable[[T, ChainBlock, Context, jax.Array | int], T],
        carry: T,
        context: Context,
    ) -> T:
        """Return the carry after `step(carry, block, context, index)` of every block, in order.

        Args:
          step: takes a block, the context of its layer and its index.
          carry: what the first step takes.
          context: of all layers.
        """

        def body(carry: T, layer: tuple) -> tuple[T, None]:
            block, index = layer
            return step(carry, block, context.layer(index), index), None

        layers = (self.blocks, jnp.arange(self.config.num_layers))
        return jax.lax.scan(body, carry, layers)[0]

    def init_cache(self, batch: int, size: int, dtype=None) -> KVCache:
        """Return an empty cache for `size` positions, in `dtype`: a float type, int8, or None for the model's own."""
        shape = (self.config.num_layers, *self._cache_shape(batch, size))
        return KVCache(layers=empty_layer(shape, dtype or self.dtype), length=jnp.int32(0))

    def _cache_shape(self, batch: int, size: int) -> tuple[int, ...]:
        return 2, batch, self.config.num_kv_heads, size, self.config.head_dim

    def embed_tokens(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Return the first block's input, in `dtype`; NaN for an id outside the vocabulary, as `jit` lets it pass."""
        last = self.config.vocab_size - 1
        rows = self.scale_embedding(self.embedding_rows(jnp.clip(tokens, 0, last)))
        return jnp.where(
            ((tokens >= 0) & (tokens <= last))[..., None], rows, jnp.asarray(jnp.nan, rows.dtype)
        )

    def embedding_rows(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Return the embeddings of ids within the vocabulary, in `dtype`."""
        # Of one row XLA makes a slice, before which a GPU would gather all of an embedding that is split.
        places = jnp.pad(tokens.reshape(-1), (0, 1 if tokens.size == 1 else 0))
        rows = take_rows(self.embed.get_value(), places, self.dtype)
        return rows[: tokens.size].reshape(*tokens.shape, -1)

    def scale_embedding(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return embeddings times the scale that the family has for them, if any."""
        scale = self.config.embed_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def last_norm(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the last block's output after the final norm."""
        return self.norm(x)

    def logits(self, h: Float[Array, "*tokens d"]) -> Float[Array, "*tokens vocab"]:
        """Return logits from `hidden`'s output, accumulated and returned in float32."""
        return self.cap_logits(self.head_outputs(h))

    def head_outputs(self, h: Float[Array, "*tokens d"]) -> Float[Array, "*tokens vocab"]:
        """Return what `cap_logits` makes logits of, float32."""
        kernel, by_rows = self._head_kernel(h.dtype)
        # For a single row of narrow floats, XLA on GPUs would first write out the whole matrix in float32.
        rows = h.reshape(-1, h.shape[-1])
        rows = jnp.pad(
            rows, ((0, _LOGIT_ROWS - 1 if len(rows) == 1 and h.dtype != jnp.float32 else 0), (0, 0))
        )
        y = jnp.einsum(
            "td,vd->tv" if by_rows else "td,dv->tv",
            rows,
            kernel,
            precision=precision(h.dtype),
            preferred_element_type=jnp.float32,
        )
        return y[: h.size // h.shape[-1]].reshape(*h.shape[:-1], -1)

    def head_slope(self, slope: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens d"]:
        """Return the slope at `hidden`'s output from that at `head_outputs`, multiplied and returned in its dtype.

        Where that is narrow, the transpose that JAX derives would be a product of float32.
        """
        kernel, by_rows = self._head_kernel(slope.dtype)
        return jnp.einsum(
            "...v,vd->...d" if by_rows else "...v,dv->...d", slope, kernel, precision=precision(slope.dtype)
        )

    def _head_kernel(self, dtype: DTypeLike) -> tuple[Float[Array, "_ _"], bool]:
        """Return the head's matrix in `dtype`, and whether its rows are the vocabulary's."""
        kernel = self.embed.get_value() if self.head is None else self.head.kernel.get_value()
        by_rows = self.head is None
        if isinstance(kernel, PackedTensor):
            kernel, by_rows = dequantize(kernel, jnp.float32), True
        return kernel.astype(dtype), by_rows

    def cap_logits(self, y: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens vocab"]:
        """Return logits scaled and capped as the family has it, if it does."""
        scale, cap = self.config.logit_scale, self.config.logit_softcap
        y = y if scale == 1.0 else y * scale
        return y if cap is None else cap * jnp.tanh(y / cap)

    def positions(
        self,
        length: int,
        *,
        start: Int32[Array, "*b"] | int = 0,
        keys: int | None = None,
        until: Int32[Array, ""] | None = None,
    ) -> Positions:
        """Return positions of `length` tokens from `start` on, seeing `keys` slots (by default: themselves).

        The start is that of all rows, or has an entry for each. `until` is as `decode` takes it.
        """
        query = jnp.asarray(start)[..., None] + jnp.arange(length, dtype=jnp.int32)
        cos, sin = angles(self.config, query, until)
        key = query if keys is None else jnp.arange(keys, dtype=jnp.int32)
        return Positions(query=query, key=key, cos=cos, sin=sin)

    def attention_reach(self) -> Int32[Array, " layers"]:
        """Return how many positions each layer's attention reaches back, its own included; 2³¹ − 1 for all."""
        reach = np.full(self.config.num_layers, np.iinfo(np.int32).max, np.int32)
        if self.config.sliding_window is not None:
            reach[list(self.config.sliding_layers)] = self.config.sliding_window
        return jnp.asarray(reach)

    def context(
        self,
        length: int,
        *,
        start: Int32[Array, "*b"] | int = 0,
        keys: int | None = None,
        until: Int32[Array, ""] | None = None,
    ) -> Context:
        """Return what all blocks read beside their state, for `length` tokens from `start` on; see `positions`."""
        positions = self.positions(length, start=start, keys=keys, until=until)
        kinds = rotary_kinds(self.config)
        rotary = None if kinds is None else jnp.asarray(kinds)
        return Context(
            positions=positions,
            reach=self.attention_reach(),
            rotary=rotary,
            fused=self.fused,
            window=self.config.sliding_window,
        )

    @property
    def first_kernel(self) -> jax.Array | PackedTensor:
        """Returns the kernel of the first linear: how weights are held shows in it."""
        return self.blocks.linears(self.sites[0])[0].kernel.get_value()

    @property
    def sites(self) -> tuple[Site, ...]:
        """Returns the inputs of each block that are rotated and quantised, in execution order."""
        return family_of(self.config).block.sites


# Functions of their own, so that blocks of one form that are not scanned over are traced and lowered only once.
@jax.jit
def _apply_block(block: ChainBlock, x: jax.Array, context: Context) -> jax.Array:
    return block(x, context)


@jax.jit
def _decode_block(
    block: ChainBlock, x: jax.Array, cache: LayerKV, context: Context
) -> tuple[jax.Array, LayerKV]:
    return block.decode(x, cache, context)


def computing_in[M: Decoder](model: M, dtype: jnp.dtype | str, *, fused: bool = False) -> M:
    """Return the same model computing in `dtype`; its arrays are shared.

    Args:
      model: stays as it is.
      dtype: a float type.
      fused: whether attention of many tokens may be cuDNN's, where `can_fuse` says that it can; of whole sequences
        also where some layers have a window.
    """
    dtype = jnp.dtype(dtype)
    can = fused and (can_fuse(model.config, dtype) or _can_fuse_windows(model.config, dtype))
    return replace(model, dtype=dtype, fused=can)


def _can_fuse_windows(config: DecoderConfig, dtype: jnp.dtype) -> bool:
    """Return whether cuDNN's kernels take whole sequences of a model in which some layers have a window."""
    narrow = jnp.dtype(dtype).itemsize == 2 and config.head_dim <= 256 and config.head_dim % 8 == 0
    slides = config.sliding_window is not None and config.attention_softcap is None
    hopper = (compute_capability() or (0, 0)) >= (9, 0)
    return narrow and slides and hopper and fused_attention.takes_windows(config.head_dim)


def can_fuse(config: DecoderConfig, dtype: jnp.dtype) -> bool:
    """Return whether cuDNN's kernels take a model: a recent GPU, 16 bits, attention over all positions before."""
    narrow = jnp.dtype(dtype).itemsize == 2 and config.head_dim <= 128 and config.head_dim % 8 == 0
    plain = config.sliding_window is None and config.attention_softcap is None
    return narrow and plain and (compute_capability() or (0, 0)) >= (8, 0)
