"""One decoder for the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

All blocks are one `Block` whose arrays have a leading axis of layers, run by a scan: compilation and the memory for
unpacked weights are those of a single block. Weights may be arrays or `TernaryTensor`s, and each input of a block's
linears may be rotated and quantised.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from twla_jax.models import rope
from twla_jax.models.config import DecoderConfig
from twla_jax.ops.rotate_quantize import rms_norm
from twla_jax.ternary import TernaryTensor, packed_matmul
from twla_jax.uniform import IntegerTensor

# The inputs of a block that are rotated and quantised, and the linears that read each; input s is `block.{s}_input`.
SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up"), "down": ("down",)}
_QUERY_CHUNK = 256  # queries whose scores against all keys exist at the same time


def _precision(dtype) -> jax.lax.Precision | None:
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
            y = jnp.matmul(x, kernel.astype(x.dtype), precision=_precision(x.dtype))
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Positions:
    """Where queries and keys stand, and the rotary angles of the queries (which are also those of the new keys)."""

    query: Int32[Array, " t"]
    key: Int32[Array, " s"]
    cos: Float[Array, "t half"]
    sin: Float[Array, "t half"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of every layer, `[layers, b, s, kv_heads, head_dim]`, and how many positions are filled."""

    key: Float[Array, "layers b s kv d"]
    value: Float[Array, "layers b s kv d"]
    length: Int32[Array, ""]


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
        """Grouped-query attention, softmax in float32, a chunk of queries at a time."""
        b, t, heads, _ = q.shape
        kv = k.shape[2]
        chunk = min(t, _QUERY_CHUNK)
        padding = -t % chunk
        # [chunks, b, kv, group, chunk, hd]: a query group shares its key head's one matrix product.
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        q = q.reshape(b, -1, chunk, kv, heads // kv, self.head_dim).transpose(1, 0, 3, 4, 2, 5)
        query = jnp.pad(positions.query, (0, padding), mode="edge").reshape(-1, chunk)
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        matmul = functools.partial(
            jnp.matmul, precision=_precision(q.dtype), preferred_element_type=jnp.float32
        )

        def attend_chunk(operands):
            q, query = operands
            scores = (
                matmul(q.reshape(b, kv, -1, self.head_dim), k).reshape(*q.shape[:-1], -1)
                * self.head_dim**-0.5
            )
            distance = query[:, None] - positions.key[None, :]
            scores = jnp.where((distance >= 0) & (distance < window), scores, -jnp.inf)
            weights = jnp.exp(scores - scores.max(-1, keepdims=True))
            total = weights.sum(-1, keepdims=True)
            mixed = matmul(weights.reshape(b, kv, -1, k.shape[-1]).astype(v.dtype), v).reshape(q.shape)
            return (mixed / total).astype(q.dtype)

        mixed = jax.lax.map(attend_chunk, (q, query)) if t > chunk else attend_chunk((q[0], query[0]))[None]
        return mixed.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, heads * self.head_dim)[:, :t]

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
            return block(x, positions, window), None

        return self.norm(self.through_blocks(step, self.embed_tokens(tokens)))

    def decode(self, tokens: Int[Array, "b t"], cache: KVCache) -> tuple[Float[Array, "b t d"], KVCache]:
        """`hidden` for tokens that follow those in the cache, and the cache with them added.

        The caller sees to it that `cache.length + t` stays within the cache. Entries past `length` are never read.
        """
        positions = self.positions(tokens.shape[1], start=cache.length, keys=cache.key.shape[2])

        def step(carry, layer):
            x, keys, values = carry
            block, window, index = layer
            q, k, v = block.project(block.qkv_input(block.input_norm(x)), positions)
            # The whole cache is carried, not scanned over, so that a donated one is updated in place.
            at = (index, 0, cache.length, 0, 0)
            keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), at)
            values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), at)
            mixed = block.mix(
                q, keys[index].astype(q.dtype), values[index].astype(q.dtype), positions, window
            )
            return (block.finish(x, mixed), keys, values), None

        start = (self.embed_tokens(tokens), cache.key, cache.value)
        x, keys, values = self.through_blocks(step, start)
        return self.norm(x), KVCache(key=keys, value=values, length=cache.length + tokens.shape[1])

    def through_blocks(self, step: Callable, carry: Any) -> Any:
        """The carry after `step(carry, (block, window, index))` of every block, in order."""
        layers = (self.blocks, self.windows(), jnp.arange(self.config.num_layers))
        return jax.lax.scan(step, carry, layers)[0]

    def init_cache(self, batch: int, size: int) -> KVCache:
        """An empty cache for `size` positions, in `dtype`."""
        config = self.config
        shape = (config.num_layers, batch, size, config.num_kv_heads, config.head_dim)
        return KVCache(
            key=jnp.zeros(shape, self.dtype), value=jnp.zeros(shape, self.dtype), length=jnp.int32(0)
        )

    def embed_tokens(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The first block's input, in `dtype`."""
        return jnp.asarray(self.embed.get_value())[tokens].astype(self.dtype)

    def logits(self, h: Float[Array, "*tokens d"]) -> Float[Array, "*tokens vocab"]:
        """Logits from `hidden`'s output, accumulated and returned in float32."""
        kernel = self.embed.get_value() if self.head is None else self.head.kernel.get_value()
        if isinstance(kernel, TernaryTensor):
            return packed_matmul(h, kernel).astype(jnp.float32)
        equation = "...d,vd->...v" if self.head is None else "...d,dv->...v"
        return jnp.einsum(
            equation,
            h,
            kernel.astype(h.dtype),
            precision=_precision(h.dtype),
            preferred_element_type=jnp.float32,
        )

    def positions(
        self, length: int, *, start: Int32[Array, ""] | int = 0, keys: int | None = None
    ) -> Positions:
        """Positions of `length` tokens from `start` on, seeing `keys` slots (by default: themselves)."""
        query = start + jnp.arange(length, dtype=jnp.int32)
        cos, sin = rope.angles(self.config, query)
        key = query if keys is None else jnp.arange(keys, dtype=jnp.int32)
        return Positions(query=query, key=key, cos=cos, sin=sin)

    def windows(self) -> Int32[Array, " layers"]:
        """How many positions each layer's attention reaches back, its own included; the largest int32 where all."""
        reach = np.full(self.config.num_layers, np.iinfo(np.int32).max, np.int32)
        if self.config.sliding_window is not None:
            reach[list(self.config.sliding_layers)] = self.config.sliding_window
        return jnp.asarray(reach)
