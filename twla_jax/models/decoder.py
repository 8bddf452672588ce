"""One decoder for the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

All blocks are one `Block` whose arrays have a leading axis of layers, run by a scan: compilation and the memory for
unpacked weights are those of a single block. Weights may be arrays or `TernaryTensor`s, and each input of a block's
linears may be rotated and quantised.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from twla_jax.core.tensors import IntegerTensor, TernaryTensor, dequantize, packed_matmul, take_rows
from twla_jax.devices import compute_capability
from twla_jax.models.config import DecoderConfig
from twla_jax.models.rope import angles
from twla_jax.ops.attention import rope
from twla_jax.ops.attention.kv_cache import KVCache, LayerKV, empty_layer, write
from twla_jax.ops.attention.reference import Positions, attention, fused_attention
from twla_jax.ops.rotate_quantize import rms_norm

# The inputs of a block that are rotated and quantised, and the linears that read each; input s is `block.{s}_input`.
SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up"), "down": ("down",)}
_LOGIT_ROWS = 8  # instead of a single one


def precision(dtype) -> jax.lax.Precision | None:
    """float32 means true float32 on every chip; narrower types take the chip's own."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Linear(nnx.Module):
    """`y = x W + b`. `kernel` holds an array `[*leading, in, out]` or a packed tensor, whose rows are outputs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        leading: tuple[int, ...],
        rngs: nnx.Rngs,
        dtype,
    ):
        shape = (*leading, in_features, out_features)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * in_features**-0.5)
        self.bias = nnx.Param(jnp.zeros((*leading, out_features), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*tokens m"]) -> Float[Array, "*tokens n"]:
        """Applies the layer in `x.dtype`; a packed kernel is unpacked here and nowhere else."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, TernaryTensor | IntegerTensor):
            y = packed_matmul(x, kernel)
        else:
            y = jnp.matmul(x, kernel.astype(x.dtype), precision=precision(x.dtype))
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + ε) · scale`, in float32 inside, `x.dtype` outside."""

    def __init__(self, size: int, *, epsilon: float, leading: tuple[int, ...], dtype):
        self.scale = nnx.Param(jnp.ones((*leading, size), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape d"]) -> Float[Array, "*shape d"]:
        """Normalises the last axis."""
        return rms_norm(x, self.scale.get_value(), self.epsilon)


class InputTransform(nnx.Module):
    """What an input goes through first: a `KroneckerRotation`, then an `ActivationQuantizer`; each may be None."""

    def __init__(self):
        # Marked as data while None, so that a Param may be put in later.
        self.rotation = nnx.data(None)
        self.activation = nnx.data(None)

    def __call__(self, x: Float[Array, "*tokens m"]) -> Float[Array, "*tokens m"]:
        """The transformed x, in `x.dtype`."""
        for transform in (self.rotation, self.activation):
            if transform is not None:
                x = transform.get_value()(x)
        return x


class Block(nnx.Module):
    """One transformer block; `attend` and `gate_up` end where the input of the next linear begins."""

    def __init__(self, config: DecoderConfig, *, leading: tuple[int, ...], rngs: nnx.Rngs, dtype):
        d, heads, kv_heads = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )

        def linear(m, n, bias):
            return Linear(m, n, bias=bias, leading=leading, rngs=rngs, dtype=dtype)

        def norm(size):
            return RMSNorm(size, epsilon=config.rms_norm_eps, leading=leading, dtype=dtype)

        self.input_norm, self.post_norm = norm(d), norm(d)
        self.q = linear(d, heads, config.qkv_bias)
        self.k = linear(d, kv_heads, config.qkv_bias)
        self.v = linear(d, kv_heads, config.qkv_bias)
        self.o = linear(heads, d, config.o_bias)
        self.q_norm = norm(config.head_dim) if config.qk_norm else None
        self.k_norm = norm(config.head_dim) if config.qk_norm else None
        self.gate = linear(d, config.intermediate_size, config.mlp_bias)
        self.up = linear(d, config.intermediate_size, config.mlp_bias)
        self.down = linear(config.intermediate_size, d, config.mlp_bias)
        self.qkv_input, self.o_input = InputTransform(), InputTransform()
        self.mlp_input, self.down_input = InputTransform(), InputTransform()
        self.head_dim = config.head_dim
        self.fused = (
            False  # attention of whole sequences as one kernel; `attention.can_fuse` says where there is one
        )

    def __call__(
        self, x: Float[Array, "b t d"], positions: Positions, window: Int32[Array, ""]
    ) -> Float[Array, "b t d"]:
        """The block's output for whole sequences; `window` is this layer's entry of `Decoder.windows`."""
        h = self.qkv_input(self.input_norm(x))
        return self.finish(x, self.attend(h, positions, window))

    def attend(
        self, h: Float[Array, "b t d"], positions: Positions, window: Int32[Array, ""]
    ) -> Float[Array, "b t heads_d"]:
        """Attention over the same tokens, before the output linear; h went through `qkv_input`."""
        return self.mix(*self.project(h, positions), positions, window)

    def project(
        self, h: Float[Array, "b t d"], positions: Positions
    ) -> tuple[Float[Array, "b t heads hd"], Float[Array, "b t kv hd"], Float[Array, "b t kv hd"]]:
        """Queries, keys and values; queries and keys normed where the family does so, and turned to their positions."""
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in self.qkv(h))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rope.rotate(q, positions.cos, positions.sin), rope.rotate(k, positions.cos, positions.sin), v

    def decode(
        self, x: Float[Array, "b t d"], layer: LayerKV, positions: Positions, window: Int32[Array, ""]
    ) -> tuple[Float[Array, "b t d"], LayerKV]:
        """The block's output for tokens that follow those in the cache, and the cache with them added."""
        mixed, layer = self.attend_cached(self.qkv_input(self.input_norm(x)), layer, positions, window)
        return self.finish(x, mixed), layer

    def attend_cached(
        self, h: Float[Array, "b t d"], layer: LayerKV, positions: Positions, window: Int32[Array, ""]
    ) -> tuple[Float[Array, "b t heads_d"], LayerKV]:
        """`attend`, of tokens that follow those in the cache, and the cache with them added."""
        q, k, v = self.project(h, positions)
        layer = write(layer, k, v, positions.query[0])
        return attention(q, layer, positions, window), layer

    def qkv(self, h: Float[Array, "b t d"]) -> tuple[Float[Array, "b t _"], ...]:
        """What the q, k and v linears make of h, which went through `qkv_input`."""
        return self.q(h), self.k(h), self.v(h)

    def mix(
        self,
        q: Float[Array, "b t heads hd"],
        k: Float[Array, "b s kv hd"],
        v: Float[Array, "b s kv hd"],
        positions: Positions,
        window: Int32[Array, ""],
    ) -> Float[Array, "b t heads_d"]:
        """Attention of these queries to these keys and values."""
        if self.fused and q.shape[1] == k.shape[1]:
            return fused_attention(q, k, v)
        return attention(q, LayerKV(entries=jnp.stack([k, v]).swapaxes(2, 3)), positions, window)

    def gate_up(self, h: Float[Array, "b t d"]) -> Float[Array, "b t hidden"]:
        """`silu(gate(h)) · up(h)`, before the down linear; h went through `mlp_input`."""
        return jax.nn.silu(self.gate(h)) * self.up(h)

    def finish(self, x: Float[Array, "b t d"], mixed: Float[Array, "b t heads_d"]) -> Float[Array, "b t d"]:
        """From the attention's mix to the block's output: output linear, MLP and both residuals."""
        x = x + self.o(self.o_input(mixed))
        h = self.mlp_input(self.post_norm(x))
        return x + self.down(self.down_input(self.gate_up(h)))


class Decoder(nnx.Module):
    """The language model. A pytree: it goes through `jax.jit`, `jax.device_put` and `jax.tree.map` as it is.

    `dtype` is what it computes in; weights are cast to it where they are used, while norms, softmax and logits stay
    float32.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        """Random weights in `param_dtype`; `nnx.eval_shape` over this gives the abstract model that readers fill."""
        self.config = config
        self.dtype = jnp.dtype(dtype)
        embed = jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), param_dtype)
        self.embed = nnx.Param(embed * 0.02)
        self.blocks = Block(config, leading=(config.num_layers,), rngs=rngs, dtype=param_dtype)
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, leading=(), dtype=param_dtype)
        self.head = (
            None
            if config.tie_word_embeddings
            else Linear(
                config.hidden_size, config.vocab_size, bias=False, leading=(), rngs=rngs, dtype=param_dtype
            )
        )

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Logits of the next token at every position, float32."""
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The last block's output after the final norm, in `dtype`."""
        positions = self.positions(tokens.shape[1])

        def step(x, layer):
            block, window, _ = layer
            return _apply_block(block, x, positions, window), None

        return self.norm(self.through_blocks(step, self.embed_tokens(tokens)))

    def decode(self, tokens: Int[Array, "b t"], cache: KVCache) -> tuple[Float[Array, "b t d"], KVCache]:
        """`hidden` for tokens that follow those in the cache, and the cache with them added.

        The caller sees to it that `cache.length + t` stays within the cache. Entries past `length` are never read.
        """
        positions = self.positions(tokens.shape[1], start=cache.length, keys=cache.size)

        def step(carry, layer):
            x, cache = carry
            block, window, index = layer
            x, entries = _decode_block(block, x, cache.layer(index), positions, window)
            # The whole cache is carried, not scanned over, so that a donated one is updated in place.
            return (x, cache.with_layer(index, entries)), None

        x, cache = self.through_blocks(step, (self.embed_tokens(tokens), cache))
        return self.norm(x), dataclasses.replace(cache, length=cache.length + tokens.shape[1])

    def through_blocks(self, step: Callable, carry: Any) -> Any:
        """The carry after `step(carry, (block, window, index))` of every block, in order."""
        layers = (self.blocks, self.windows(), jnp.arange(self.config.num_layers))
        return jax.lax.scan(step, carry, layers)[0]

    def init_cache(self, batch: int, size: int, dtype=None) -> KVCache:
        """An empty cache for `size` positions, in `dtype`: a float type, int8, or None for the model's own."""
        shape = (self.config.num_layers, *self._cache_shape(batch, size))
        return KVCache(layers=empty_layer(shape, dtype or self.dtype), length=jnp.int32(0))

    def _cache_shape(self, batch: int, size: int) -> tuple[int, ...]:
        return 2, batch, self.config.num_kv_heads, size, self.config.head_dim

    def embed_tokens(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The first block's input, in `dtype`."""
        return take_rows(self.embed.get_value(), tokens, self.dtype)

    def logits(self, h: Float[Array, "*tokens d"]) -> Float[Array, "*tokens vocab"]:
        """Logits from `hidden`'s output, accumulated and returned in float32."""
        kernel = self.embed.get_value() if self.head is None else self.head.kernel.get_value()
        by_rows = self.head is None
        if isinstance(kernel, TernaryTensor | IntegerTensor):
            kernel, by_rows = dequantize(kernel, jnp.float32), True
        # For a single row of narrow floats, XLA on GPUs would first write out the whole matrix in float32.
        rows = h.reshape(-1, h.shape[-1])
        rows = jnp.pad(
            rows, ((0, _LOGIT_ROWS - 1 if len(rows) == 1 and h.dtype != jnp.float32 else 0), (0, 0))
        )
        y = jnp.einsum(
            "td,vd->tv" if by_rows else "td,dv->tv",
            rows,
            kernel.astype(h.dtype),
            precision=precision(h.dtype),
            preferred_element_type=jnp.float32,
        )
        return y[: h.size // h.shape[-1]].reshape(*h.shape[:-1], -1)

    def positions(
        self, length: int, *, start: Int32[Array, ""] | int = 0, keys: int | None = None
    ) -> Positions:
        """Positions of `length` tokens from `start` on, seeing `keys` slots (by default: themselves)."""
        query = start + jnp.arange(length, dtype=jnp.int32)
        cos, sin = angles(self.config, query)
        key = query if keys is None else jnp.arange(keys, dtype=jnp.int32)
        return Positions(query=query, key=key, cos=cos, sin=sin)

    def windows(self) -> Int32[Array, " layers"]:
        """How many positions each layer's attention reaches back, its own included; the largest int32 where all."""
        reach = np.full(self.config.num_layers, np.iinfo(np.int32).max, np.int32)
        if self.config.sliding_window is not None:
            reach[list(self.config.sliding_layers)] = self.config.sliding_window
        return jnp.asarray(reach)


# Functions of their own, so that blocks of one form that are not scanned over are traced and lowered only once.
@jax.jit
def _apply_block(block: Block, x: jax.Array, positions: Positions, window: jax.Array) -> jax.Array:
    return block(x, positions, window)


@jax.jit
def _decode_block(
    block: Block, x: jax.Array, layer: LayerKV, positions: Positions, window: jax.Array
) -> tuple[jax.Array, LayerKV]:
    return block.decode(x, layer, positions, window)


def can_fuse(config: DecoderConfig, dtype) -> bool:
    """Whether cuDNN's kernels take a model: on a recent GPU, in 16 bits, where attention reaches back all the way."""
    narrow = jnp.dtype(dtype).itemsize == 2 and config.head_dim <= 128 and config.head_dim % 8 == 0
    return narrow and config.sliding_window is None and (compute_capability() or (0, 0)) >= (8, 0)
